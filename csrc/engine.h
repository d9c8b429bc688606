// A session: blocks of rows in chunks, and what stays in memory between its phases.
//
// A *chunk* is a run of blocks and a range of groups whose maps (head-free for heads="mean") fit their
// share of the budget. The student's attention [heads, keys, rows] of a chunk is kept as far as its share
// reaches: the gradient takes it up in *passes*, of which the last one computed by the forward sweep need
// not be computed again. Where the whole attention fits, no score is ever computed twice.
//
// Products run on reals (Plain), or for a side given in bfloat16, where the machine multiplies pairs of
// them, on the inputs as they are (Pairs); its exponentials are then kept as bfloat16, too. Keys that lie well
// are read in place, others are packed.
#pragma once

#include <cstdint>
#include <vector>

#include "divergence.h"
#include "inputs.h"
#include "softmax.h"

namespace fastalign::FASTALIGN_ISA {

struct Chunk {
  Range blocks, groups;
};

// A part of a chunk whose attention fits: the unit of the gradient. Of the `repeat` heads that share a key head it
// has those numbered by `share`, so that the threads find all key heads in every pass.
struct Pass {
  Range blocks, heads, share;
  int64_t repeat;

  Range key_heads() const { return {heads.begin / repeat, (heads.end - 1) / repeat + 1}; }
  Range of(int64_t key_head) const {
    return Range{key_head * repeat + share.begin, key_head * repeat + share.end}.clip(heads);
  }
  bool holds(int64_t block, int64_t head) const {
    const Range mine = of(head / repeat);
    return block >= blocks.begin && block < blocks.end && head >= mine.begin && head < mine.end;
  }
  // Places for what is kept by head.
  int64_t slots() const { return key_heads().size() * share.size(); }
  int64_t slot(int64_t head) const {
    return (head / repeat - key_heads().begin) * share.size() + head % repeat - share.begin;
  }
  // The heads as ranges.
  std::vector<Range> runs() const {
    if (share.size() == repeat) return {heads};
    std::vector<Range> out;
    for (int64_t kv = key_heads().begin; kv < key_heads().end; ++kv)
      if (of(kv).size() > 0) out.push_back(of(kv));
    return out;
  }
};

template <typename T> class Engine final : public Session {
 public:
  explicit Engine(const FaCall& call) : call_(call) {
    select();
    cut_chunks();
    adds_queries_ = call_.heads == kMix &&
                    std::any_of(chunks_.begin(), chunks_.end(), [&](const Chunk& chunk) {
                      return chunk.groups.size() < call_.groups;
                    });
    clear_gradients();
    scratch_.resize(std::max<int64_t>(1, call.threads));
  }

  int64_t chunks() const override { return static_cast<int64_t>(chunks_.size()); }
  void maps(int64_t chunk) override;
  void statistics(int64_t chunk, const void* thresholds) override;
  void pool(int64_t chunk, const void* thresholds) override;
  void gradients(int64_t chunk, const void* thresholds, const FaCoefficients& c) override;

 private:
  static constexpr int W = kWidth<T>;

  static constexpr int64_t kPair = 2;  // heads that one thread adds to the maps at once
  static constexpr int64_t kMostHeads = 32;  // and all threads

  // What one thread works in.
  struct Scratch {
    Buffer<T> scores, strip, queries, transposed, column, slopes, d_q, d_k, delta;
    Buffer<char> stretches;
  };
  // Packed keys of one side, by sample: [key_heads, padded keys, stride].
  using Packed = std::vector<Buffer<T>>;

  // ------------------------------------------------------------------ selection and layout

  void select() {
    for (int64_t b = 0; b < call_.batch; ++b) {
      const Visibility visibility(call_, b);
      Sample s = select_sample(call_, b, visibility);
      if (s.row.empty() || s.key_of_column.empty()) continue;
      // fewer rows a block where a tile would be far larger than any cache, and the workspace with it
      constexpr int64_t largest = 6 << 20;
      int64_t vector = 0;  // bytes
      with_product(call_.student, [&](auto op) {
        vector = s.all[0].end * W * int64_t(sizeof(typename decltype(op)::Stored));
      });
      const int64_t vectors = std::clamp<int64_t>(largest / std::max<int64_t>(1, vector), 1, 3);
      cut_blocks(s, static_cast<int64_t>(samples_.size()), W, vectors, blocks_);
      samples_.push_back(std::move(s));
      visibility_.push_back(visibility);
    }
    for (Packed& keys : keys_) keys.resize(samples_.size());
    key_pairs_.resize(samples_.size());
    fresh_.assign(samples_.size() * call_.student.key_heads, true);
    tile_at_.push_back(0);
    lane_at_.push_back(0);
    for (const Block& block : blocks_) {
      tile_at_.push_back(tile_at_.back() + tile_size(call_.student, block));
      lane_at_.push_back(lane_at_.back() + block.lanes);
    }
  }

  int64_t map_size(const Block& block, int64_t groups) const {
    return 2 * groups * block.columns.size() * block.lanes;
  }
  int64_t heads_of(const FaSide& side, Range groups) const {
    return call_.heads == kEach ? groups.size() : side.heads;
  }

  // Elements of attention to keep: half of the budget and what the maps leave of their quarter, less two tiles
  // that are worked in.
  int64_t slab_size() const {
    const int64_t tile = widest_tile({0, static_cast<int64_t>(blocks_.size())});
    int64_t maps = 0;
    for (const Block& block : blocks_) maps += map_size(block, call_.groups);
    const int64_t quarter = call_.budget / 4 / int64_t(sizeof(T));
    return std::max(quarter, 2 * quarter + std::max<int64_t>(0, quarter - maps) - 2 * tile);
  }

  void cut_chunks() {
    const int64_t size = sizeof(T), room = call_.budget / 4 / size, slab = slab_size();
    const auto count = static_cast<int64_t>(blocks_.size());
    for (int64_t from = 0; from < count;) {
      int64_t groups = call_.groups;
      while (groups > 1 && map_size(blocks_[from], groups) > room) groups = (groups + 1) / 2;
      int64_t to = from, maps = 0;
      const int64_t heads = heads_of(call_.student, {0, groups});
      for (; to < count; ++to) {
        maps += map_size(blocks_[to], groups);
        const int64_t attention = (tile_at_[to + 1] - tile_at_[from]) * heads;
        const bool fits = !call_.local || !call_.wanted || attention <= slab || to - from < 8;
        if (to > from && (maps > room || !fits)) break;
      }
      for (int64_t g = 0; g < call_.groups; g += groups)
        chunks_.push_back({{from, to}, {g, std::min(call_.groups, g + groups)}});
      from = to;
    }
  }

  // The passes of a chunk, in order; the last is the one that the forward sweep leaves in the slab.
  std::vector<Pass> passes(const Chunk& chunk) const {
    std::vector<Pass> out;
    if (!call_.wanted) return out;
    const int64_t slab = slab_size();
    const Range heads = head_range(call_.student, true, chunk);
    const int64_t repeat = call_.student.heads / call_.student.key_heads;
    for (int64_t from = chunk.blocks.begin; from < chunk.blocks.end;) {
      int64_t to = from + 1;
      while (to < chunk.blocks.end && (tile_at_[to + 1] - tile_at_[from]) * heads.size() <= slab) ++to;
      Pass pass{{from, to}, heads, {0, repeat}, repeat};
      // As many heads as fit, in equal shares: of every key head some, else of some key heads one.
      const int64_t fit = std::max<int64_t>(1, slab / std::max<int64_t>(1, tile_at_[to] - tile_at_[from]));
      const int64_t key_heads = pass.key_heads().size();
      const int64_t step = heads.size() <= fit ? repeat : equal(repeat, std::max<int64_t>(1, fit / key_heads));
      const int64_t owned = equal(key_heads, heads.size() <= fit ? key_heads : std::max<int64_t>(1, fit / step));
      for (int64_t kv = heads.begin / repeat; kv * repeat < heads.end; kv += owned)
        for (int64_t r = 0; r < repeat; r += step) {
          pass.heads = Range{kv * repeat, (kv + owned) * repeat}.clip(heads);
          pass.share = {r, std::min(repeat, r + step)};
          out.push_back(pass);
        }
      from = to;
    }
    return out;
  }
  // The size of the shares when `count` is cut into as few equal ones as have at most `most`.
  static int64_t equal(int64_t count, int64_t most) {
    const int64_t shares = (count + most - 1) / most;
    return (count + shares - 1) / shares;
  }

  // The heads of a side that a chunk's groups need: group g is head g, but for a mean or a mixed student.
  Range head_range(const FaSide& side, bool student, const Chunk& chunk) const {
    return style(student) == kEach ? chunk.groups : Range{0, side.heads};
  }
  int64_t style(bool student) const {
    return !student && call_.heads == kMix ? int64_t(kEach) : call_.heads;
  }

  // Where things of the current chunk or pass lie.
  T* attention(const Pass& pass, int64_t block, int64_t head) {
    return slab_.get() + (tile_at_[block] - tile_at_[pass.blocks.begin]) * pass.slots() +
           pass.slot(head) * (tile_at_[block + 1] - tile_at_[block]);
  }
  // One head's attention for one block of rows: [keys, lanes], and a factor for each strip, [strips, lanes].
  template <typename Op> struct Tile {
    typename Op::Stored* entries;
    T* factors;
  };
  template <typename Op> Tile<Op> tile(T* at, const Block& block) const {
    constexpr int64_t per = sizeof(T) / sizeof(typename Op::Stored);
    return {reinterpret_cast<typename Op::Stored*>(at), at + block.width() / per * block.lanes};
  }
  int64_t tile_size(const FaSide& s, const Block& block) const {
    int64_t size = 0;
    with_product(s, [&](auto op) {
      size = block.tile(sizeof(T) / sizeof(typename decltype(op)::Stored));
    });
    return size;
  }
  template <typename Op>
  typename Op::Element* packed_queries(const Pass& pass, int64_t block, int64_t head) {
    const int64_t lanes = lane_at_[pass.blocks.end] - lane_at_[pass.blocks.begin];
    T* rows = query_rows_.get() + (pass.slot(head) * lanes + lane_at_[block] - lane_at_[pass.blocks.begin]) *
                                      packed_stride<T>(call_.student.size);
    return reinterpret_cast<typename Op::Element*>(rows);
  }
  T* plane(int64_t side, int64_t block, int64_t group) {  // group counts from the chunk's first
    const Block& b = blocks_[block];
    return maps_.get() + map_at_[block - chunk_.blocks.begin] +
           (side * chunk_.groups.size() + group) * b.columns.size() * b.lanes;
  }
  T* mass(int64_t block, int64_t group) {
    return mass_.get() + (block - chunk_.blocks.begin) * chunk_.groups.size() * 3 * W + group * 3 * W;
  }
  const uint64_t* masks(const Block& block) const { return masks_.data() + block.masks; }
  uint64_t column_mask(const Block& block, int64_t column) const {
    return masks(block)[samples_[block.sample].key_of_column[column] - block.keys.begin];
  }

  const FaSide& side(bool student) const { return student ? call_.student : call_.teacher; }
  Cap<T> cap(const FaSide& s) const {
    if (s.softcap == 0) return {};
    return {T(1 / s.softcap), T(s.softcap / call_.temperature)};
  }
  T query_factor(const FaSide& s) const {
    return T(s.softcap == 0 ? s.scale / call_.temperature : s.scale);
  }
  // Calls f(Op): how the products of a side run.
  template <typename F> void with_product([[maybe_unused]] const FaSide& s, F f) const {
#ifdef __AVX512BF16__
    if constexpr (kHasPairs<T>)
      if (s.q.dtype == kBFloat16 && s.k.dtype == kBFloat16 && s.size % 2 == 0) {
        if (keeps_exponentials(s)) return f(Pairs<BFloat16>());
        return f(Pairs<T>());
      }
#endif
    f(Plain<T>());
  }
  // Elements of a row of queries or keys in a product over the head's dimension.
  template <typename Op> static int64_t words(const FaSide& s) { return Op::pairs ? s.size / 2 : s.size; }
  // Whether a head's tile holds exp(S - m), to be multiplied by a factor a row, or S itself.
  bool keeps_exponentials(const FaSide& s) const {
    return !call_.in_logs && call_.normalize != kScores && s.softcap == 0;
  }

  // Whether a side's map is a mean of exponentials, which may be added several heads at a time.
  bool adds_exponentials(bool student) const {
    return style(student) == kMean && keeps_exponentials(side(student));
  }
  // Whether the threads share the heads of a block: blocks are few, and tiles large (beside the workspace, so that
  // tests with a small one come here, too).
  bool by_heads(bool student) const {
    return call_.threads > 1 && adds_exponentials(student) && chunk_.blocks.size() < 2 * call_.threads &&
           widest_tile(chunk_.blocks) * int64_t(sizeof(T)) > call_.budget / 256;
  }
  int64_t widest_tile(Range blocks) const {
    int64_t size = 0;
    for (int64_t i = blocks.begin; i < blocks.end; ++i)
      size = std::max({size, tile_size(call_.student, blocks_[i]), tile_size(call_.teacher, blocks_[i])});
    return size;
  }

  // Values by row of the lanes of a block; `missing` in lanes without a row.
  void gather(const T* values, const Block& block, T missing, T* out) const {
    const int32_t* row = &samples_[block.sample].row[block.first];
    for (int64_t i = 0; i < block.lanes; ++i) out[i] = i < block.live ? values[row[i]] : missing;
  }
  void scatter(const T* lanes, const Block& block, T* values) const {
    const int32_t* row = &samples_[block.sample].row[block.first];
    for (int64_t i = 0; i < block.live; ++i) values[row[i]] = lanes[i];
  }
  int64_t by_row(int64_t b, int64_t group) const { return (b * call_.groups + group) * call_.rows; }

  // Calls f(Constant<NV>) with the block's number of vectors.
  template <typename F> static void with_vectors(const Block& block, F f) {
    switch (block.lanes / W) {
      case 1: return f(Constant<1>());
      case 2: return f(Constant<2>());
      default: return f(Constant<3>());
    }
  }

  // ------------------------------------------------------------------------------ keys.h

  template <typename Op> bool in_place(const FaSide& from, const Sample& s) const;
  template <typename Missing, typename Pack> int64_t pack(const FaSide& from, Packed& to, int64_t reals,
                                                          Missing missing, Pack pack);
  int64_t pack_keys(bool student);
  void pack_key_pairs();
  template <typename Op> Rows<typename Op::Element> key_rows(bool student, int64_t sample,
                                                             int64_t head) const;
  template <typename Op> Rows<typename Op::Element> transposed_keys(int64_t sample, int64_t head) const;
  template <typename Op> void load_queries(const FaSide& s, const Block& block, int64_t head,
                                           typename Op::Element* rows);
  template <typename Op> void pack_queries(const Block& block, const typename Op::Element* rows,
                                           typename Op::Element* out);

  // ------------------------------------------------------------------------------ maps.h

  void enter(const Chunk& chunk);
  void find_masks();
  void sweep(Range sides);
  template <typename Op> void sweep_heads(bool student);
  // Whether a tile lies in the slab, where the gradient will look for it.
  bool is_kept(bool student, int64_t block, int64_t head) const {
    return student && !passes_.empty() && passes_.back().holds(block, head);
  }
  template <typename Op> Tile<Op> tile_of(bool student, int64_t block, int64_t head, T* else_at);
  template <typename Op, int NV> void head_maps(bool student, int64_t block, Range heads,
                                                Scratch& scratch, int64_t place);
  template <typename Op, int NV> void head_tile(bool student, int64_t block, int64_t head,
                                                const Tile<Op>& tile, Vec<T>* lse, Scratch& scratch);
  template <typename Op, int NV> void score_strip(Rows<typename Op::Element> keys, bool student,
                                                  const Block& block, Range strip, T hidden,
                                                  Scratch& scratch, T* s, Vec<T>* top);
  // Where a strip's scores go: to their place in a tile that keeps them, or to where their exponentials are
  // taken.
  template <typename Stored> T* scores(Stored* kept, bool exponentiate, Scratch& scratch) const {
    if constexpr (std::is_same_v<Stored, T>)
      if (!exponentiate) return kept;
    return scratch.strip.get();
  }
  template <typename F> void each_column_strip(const Block& block, Range columns, F f) const;
  template <typename Op, int NV> void add_exponentials(bool student, int64_t block, Range heads,
                                                       const Tile<Op>* tiles, Range columns);
  template <typename Op, int NV> void absorb(bool student, int64_t block, int64_t head,
                                             const Tile<Op>& tile, const Vec<T>* lse, T* sum);
  template <int NV> void finish_logs(bool student, int64_t block, const T* sum);
  void renormalise(int64_t side, int64_t block);
  void read_target(int64_t block);
  void finish_block(int64_t block);

  // ---------------------------------------------------------------------- statistics.h

  Vec<T> keep(const Block& block, int64_t column, int v, Vec<T> s, Vec<T> t, int64_t group) const;
  void count_entries(const Block& block);
  void block_statistics(int64_t block);
  void block_moments(int64_t block);
  void pool_block(int64_t block, int64_t group, Range columns);

  // ----------------------------------------------------------------------- gradients.h

  void clear_gradients();
  void map_gradient(int64_t block, int64_t group, const FaCoefficients& c);
  template <typename Op> void pass_gradients(const Pass& pass, bool resident);
  template <typename Op> void owned_gradients(const Pass& pass, bool resident);
  template <typename Op> void shared_gradients(const Pass& pass, bool resident);
  template <typename Op, typename Slopes, typename Then>
  void head_gradients(const Pass& pass, bool resident, Range heads, Range blocks, Range keys, Slopes slopes,
                      Then then, Scratch& scratch);
  template <typename F> void each_sample(Range blocks, F f) const;
  void written(Range heads, Range blocks);

  // ------------------------------------------------------------------- head_gradient.h

  static constexpr int64_t kTogether = 8;  // blocks whose dS are near at once
  // Pairs of a head and a block whose dq are near at once: half a megabyte, at least kTogether.
  int64_t places() const {
    constexpr int64_t near = 1 << 19;
    return std::max(kTogether, near / (3 * W * call_.student.size * int64_t(sizeof(T))));
  }
  template <typename Op, int NV> void enter_head(const Pass& pass, bool resident, int64_t block,
                                                 int64_t head, Scratch& scratch, int64_t place);
  template <int NV> void log_sum_exps(int64_t block, int64_t head, Vec<T>* lse) const;
  const T* entry_gradients(int64_t block, int64_t head, Scratch& scratch);
  template <typename Op, int NV> void mix_gradient(int64_t block, int64_t head, const Tile<Op>& tile,
                                                   Scratch& scratch);
  template <typename Op, int NV> void plain_delta(int64_t block, const Tile<Op>& tile, const T* gradient,
                                                  Vec<T>* delta);
  template <typename Op, int NV> void entry_terms(int64_t block, int64_t head, const Tile<Op>& tile,
                                                  const T* gradient, T* x, Vec<T>* delta);
  template <typename Op, int NV> void strip_gradient(const Pass& pass, int64_t block, int64_t head,
                                                     Range strip, Scratch& scratch, int64_t place,
                                                     T* slopes);
  template <typename Op, int NV> void query_gradient(Range keys, int64_t end,
                                                     Rows<typename Op::Element> transposed,
                                                     const T* slopes, T* d_q);
  void store_query_gradient(int64_t block, int64_t head, const T* in);
  template <typename Op, bool kFresh, typename Slopes>
  void key_gradient(const Pass& pass, Range heads, Range part, Range keys, int64_t sample, Slopes slopes,
                    Scratch& scratch);
  T* key_row(const Sample& s, int64_t key_head, int64_t k);
  T head_weight() const { return call_.heads == kMean ? T(1) / T(call_.student.heads) : T(1); }

  FaCall call_;
  std::vector<Sample> samples_;
  std::vector<Visibility> visibility_;
  std::vector<Block> blocks_;
  std::vector<int64_t> tile_at_, lane_at_;  // sums of tiles and lanes over the blocks before
  std::vector<Chunk> chunks_;
  std::vector<Scratch> scratch_;

  Packed keys_[2];        // student, teacher
  Packed key_pairs_;      // the student's, pairs along the keys: what dq of a bfloat16 side sums over
  std::vector<char> fresh_;  // by sample and key head: whether dk has not been written to
  bool adds_queries_ = false;  // whether a head's dq comes from more than one chunk
  int64_t resident_ = -1;  // the chunk whose maps lie in maps_
  Chunk chunk_{};
  int64_t together_ = 1, widest_ = 0;  // blocks a thread takes at once; the largest map of a block
  std::vector<int64_t> map_at_;
  std::vector<uint64_t> masks_;
  Buffer<T> maps_, mass_, slab_, tiles_, slopes_, query_rows_, mix_parts_;
  std::vector<Pass> passes_;
  const T* thresholds_ = nullptr;
};

}  // namespace fastalign::FASTALIGN_ISA
