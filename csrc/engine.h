// A session: blocks of rows in chunks, and what stays in memory between its phases.
//
// A *chunk* is a run of blocks and a range of groups whose maps (head-free for heads="mean") fit their
// share of the budget. The student's attention [heads, keys, rows] of a chunk is kept as far as its share
// reaches: the gradient takes it up in *passes*, of which the last one computed by the forward sweep need
// not be computed again. Where the whole attention fits, no score is ever computed twice.
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

// A part of a chunk whose attention fits: the unit of the gradient.
struct Pass {
  Range blocks, heads;
  bool holds(int64_t block, int64_t head) const {
    return block >= blocks.begin && block < blocks.end && head >= heads.begin && head < heads.end;
  }
};

template <typename T> class Engine final : public Session {
 public:
  explicit Engine(const FaCall& call) : call_(call) {
    select();
    cut_chunks();
    scratch_.resize(std::max<int64_t>(1, call.threads));
  }

  int64_t chunks() const override { return static_cast<int64_t>(chunks_.size()); }
  void maps(int64_t chunk) override;
  void statistics(int64_t chunk, const void* thresholds) override;
  void pool(int64_t chunk, const void* thresholds) override;
  void gradients(int64_t chunk, const void* thresholds, const FaCoefficients& c) override;

 private:
  static constexpr int W = kWidth<T>;

  // What one thread works in.
  struct Scratch {
    Buffer<T> scores, queries, transposed, column, d_q, d_k;
    std::vector<Stretch<T>> stretches;
  };
  // Packed keys of one side, by sample: [key_heads, padded keys, stride].
  using Packed = std::vector<Buffer<T>>;

  // ------------------------------------------------------------------ selection and layout

  void select() {
    for (int64_t b = 0; b < call_.batch; ++b) {
      const Visibility visibility(call_, b);
      Sample s = select_sample(call_, b, visibility);
      if (s.row.empty() || s.key_of_column.empty()) continue;
      cut_blocks(s, static_cast<int64_t>(samples_.size()), W, blocks_);
      samples_.push_back(std::move(s));
      visibility_.push_back(visibility);
    }
    keys_[0].resize(samples_.size());
    keys_[1].resize(samples_.size());
    tile_at_.push_back(0);
    lane_at_.push_back(0);
    for (const Block& block : blocks_) {
      tile_at_.push_back(tile_at_.back() + block.tile());
      lane_at_.push_back(lane_at_.back() + block.lanes);
    }
  }

  int64_t map_size(const Block& block, int64_t groups) const {
    return 2 * groups * block.columns.size() * block.lanes;
  }
  int64_t heads_of(const FaSide& side, Range groups) const {
    return call_.heads == kEach ? groups.size() : side.heads;
  }

  void cut_chunks() {
    const int64_t size = sizeof(T), room = call_.budget / 4 / size, slab = call_.budget / 2 / size;
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
    const int64_t slab = call_.budget / 2 / int64_t(sizeof(T));
    const Range heads = head_range(call_.student, true, chunk);
    for (int64_t from = chunk.blocks.begin; from < chunk.blocks.end;) {
      int64_t to = from + 1;
      while (to < chunk.blocks.end && (tile_at_[to + 1] - tile_at_[from]) * heads.size() <= slab) ++to;
      const int64_t tile = tile_at_[to] - tile_at_[from];
      const int64_t step = std::clamp<int64_t>(slab / std::max<int64_t>(1, tile), 1, heads.size());
      for (int64_t h = heads.begin; h < heads.end; h += step)
        out.push_back({{from, to}, {h, std::min(heads.end, h + step)}});
      from = to;
    }
    return out;
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
    return slab_.get() + (tile_at_[block] - tile_at_[pass.blocks.begin]) * pass.heads.size() +
           (head - pass.heads.begin) * blocks_[block].tile();
  }
  T* packed_queries(const Pass& pass, int64_t block, int64_t head) {
    const int64_t lanes = lane_at_[pass.blocks.end] - lane_at_[pass.blocks.begin];
    return query_rows_.get() + ((head - pass.heads.begin) * lanes + lane_at_[block] -
                                lane_at_[pass.blocks.begin]) * packed_stride<T>(call_.student.size);
  }
  T* plane(int64_t side, int64_t block, int64_t group) {  // group counts from the chunk's first
    const Block& b = blocks_[block];
    return maps_.get() + map_at_[block - chunk_.blocks.begin] +
           (side * chunk_.groups.size() + group) * b.columns.size() * b.lanes;
  }
  T* mass(int64_t block, int64_t group) {
    return mass_.get() + (block - chunk_.blocks.begin) * chunk_.groups.size() * 3 * W + group * 3 * W;
  }
  T* factor(int64_t block, int64_t head) {
    const int64_t lanes = lane_at_[chunk_.blocks.end] - lane_at_[chunk_.blocks.begin];
    return factor_.get() + head * lanes + lane_at_[block] - lane_at_[chunk_.blocks.begin];
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
  // Whether a head's tile holds exp(S - m), to be multiplied by a factor a row, or S itself.
  bool keeps_exponentials(const FaSide& s) const {
    return !call_.in_logs && call_.normalize != kScores && s.softcap == 0;
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

  // ------------------------------------------------------------------------------ maps.h

  void enter(const Chunk& chunk);
  void find_masks();
  void pack_keys(bool student);
  const T* packed(bool student, const Block& block, int64_t head) const;
  template <int NV> void side_maps(bool student, int64_t block, Scratch& scratch);
  template <int NV> void absorb(bool student, int64_t block, int64_t head, const T* s, const Vec<T>* lse,
                                const Vec<T>* f, Scratch& scratch);
  template <int NV> void finish_logs(bool student, int64_t block, Scratch& scratch);
  void renormalise(int64_t side, int64_t block);
  void read_target(int64_t block);
  void finish_block(int64_t block);
  void load_queries(const FaSide& s, const Block& block, int64_t head, T* rows);

  // ---------------------------------------------------------------------- statistics.h

  Vec<T> keep(const Block& block, int64_t column, int v, Vec<T> s, Vec<T> t, int64_t group) const;
  void count_entries(const Block& block);
  void block_statistics(int64_t block);
  void block_moments(int64_t block);
  void pool_block(int64_t block, int64_t group, Range columns);

  // ----------------------------------------------------------------------- gradients.h

  void map_gradient(int64_t block, int64_t group, const FaCoefficients& c);
  template <int NV> void head_gradient(const Pass& pass, bool resident, int64_t block, int64_t head,
                                       Scratch& scratch);
  template <int NV> void softmax_gradient(int64_t block, int64_t head, T* s, Scratch& scratch);
  template <int NV> void query_gradient(int64_t block, int64_t head, const T* ds, Scratch& scratch);
  void key_gradient(const Pass& pass, int64_t sample, int64_t key_head, Range keys, Scratch& scratch);

  FaCall call_;
  std::vector<Sample> samples_;
  std::vector<Visibility> visibility_;
  std::vector<Block> blocks_;
  std::vector<int64_t> tile_at_, lane_at_;  // sums of tiles and lanes over the blocks before
  std::vector<Chunk> chunks_;
  std::vector<Scratch> scratch_;

  Packed keys_[2];        // student, teacher
  int64_t resident_ = -1;  // the chunk whose maps lie in maps_
  Chunk chunk_{};
  std::vector<int64_t> map_at_;
  std::vector<uint64_t> masks_;
  Buffer<T> maps_, mass_, factor_, slab_, query_rows_, mix_parts_;
  std::vector<Pass> passes_;
  const T* thresholds_ = nullptr;
};

}  // namespace fastalign::FASTALIGN_ISA
