// The gradient of one head: dS and dq of a block of rows, dk of a strip of keys.
#pragma once

#include "keys.h"

namespace fastalign::FASTALIGN_ISA {

// Before the strips: the queries packed for dk, scores that are no longer there, and the sums over V that
// every key's gradient contains. `place` counts the blocks that a thread takes together.
template <typename T>
template <typename Op, int NV>
void Engine<T>::enter_head(const Pass& pass, bool resident, int64_t index, int64_t head, Scratch& scratch,
                           int64_t place) {
  using Element = typename Op::Element;
  constexpr int lanes = NV * W;
  const FaSide& from = call_.student;
  const Block& block = blocks_[index];
  const Sample& s = samples_[block.sample];
  const int64_t size = words<Op>(from);
  const auto tile = this->tile<Op>(attention(pass, index, head), block);
  Element* packed = packed_queries<Op>(pass, index, head);
  Element* queries = Op::pairs ? reinterpret_cast<Element*>(scratch.queries.get()) : packed;
  load_queries<Op>(from, block, head, queries);
  if constexpr (Op::pairs) pack_queries<Op>(block, queries, packed);
  if (!resident) {
    transpose(queries, packed_stride<T>(size), block.live, size, block.lanes,
              reinterpret_cast<Element*>(scratch.transposed.get()));
    const auto keys = key_rows<Op>(true, block.sample, head);
    const T hidden = call_.normalize != kScores ? -kInfinity<T> : T(0);
    Vec<T> lse[NV];
    Sums<T, NV> sums;
    const bool exponentiate = keeps_exponentials(from);
    log_sum_exps<NV>(index, head, lse);
    block.each_strip(s.all, [&](int64_t, Range part) {
      auto* kept = tile.entries + (part.begin - block.keys.begin) * lanes;
      T* x = scores(kept, exponentiate, scratch);
      Vec<T> top[NV];
      score_strip<Op, NV>(keys, true, block, part, hidden, scratch, x, top);
      if (exponentiate) exponentials(part.size(), lse, x, kept, sums);
    });
    for (int64_t i = 0; exponentiate && i < block.strips(); ++i)
      for (int v = 0; v < NV; ++v)
        store(tile.factors + i * lanes + v * W,
              sums.stored[v] > 0 ? sums.exact[v] / sums.stored[v] : all<T>(T(1)));
  }
  std::fill_n(scratch.d_q.get() + place * 3 * W * from.size, from.size * lanes, T(0));
  Vec<T> delta[NV] = {};
  if (call_.heads == kMix) mix_gradient<Op, NV>(index, head, tile, scratch);
  const T* gradient = entry_gradients(index, head, scratch);
  if (keeps_exponentials(from)) plain_delta<Op, NV>(index, tile, gradient, delta);
  else entry_terms<Op, NV>(index, head, tile, gradient, scratch.column.get(), delta);
  T* sums = scratch.delta.get() + place * 3 * W;
  for (int v = 0; v < NV; ++v) store(sums + v * W, delta[v]);
  if (!call_.delta) return;
  T* out = static_cast<T*>(call_.delta) + (s.b * from.heads + head) * call_.rows;
  for (int64_t i = 0; i < block.live; ++i) out[s.row[block.first + i]] += sums[i];
}

template <typename T>
template <int NV>
void Engine<T>::log_sum_exps(int64_t index, int64_t head, Vec<T>* lse) const {
  const Block& block = blocks_[index];
  const FaSide& from = call_.student;
  T values[NV * W];
  const int64_t rows = (samples_[block.sample].b * from.heads + head) * call_.rows;
  gather(static_cast<const T*>(from.lse) + rows, block, T(0), values);
  for (int v = 0; v < NV; ++v) lse[v] = load(values + v * W);
}

// Where a head finds E: on its group's plane, or for a mixed head where mix_gradient left w E.
template <typename T>
const T* Engine<T>::entry_gradients(int64_t index, int64_t head, Scratch& scratch) {
  if (call_.heads == kMix) return scratch.column.get();
  return plane(1, index, call_.heads == kEach ? head - chunk_.groups.begin : 0);
}

// w E of a mixed head, summed over the chunk's groups, and its part of dmix = sum P E.
template <typename T>
template <typename Op, int NV>
void Engine<T>::mix_gradient(int64_t index, int64_t head, const Tile<Op>& tile, Scratch& scratch) {
  constexpr int lanes = NV * W;
  const FaSide& from = call_.student;
  const Block& block = blocks_[index];
  const int32_t* key = samples_[block.sample].key_of_column.data() + block.columns.begin;
  const int64_t groups = chunk_.groups.size();
  const bool softmax = call_.normalize != kScores, exponentials = keeps_exponentials(from);
  Vec<T> lse[NV] = {};
  if (softmax) log_sum_exps<NV>(index, head, lse);
  T* mixed = scratch.column.get();
  const T* mix = static_cast<const T*>(call_.mix) + head * call_.groups + chunk_.groups.begin;
  const bool wanted = call_.wanted & kWantMix;
  T* part = wanted ? mix_parts_.get() + ((index - chunk_.blocks.begin) * from.heads + head) * groups : nullptr;
  for (int64_t g = 0; g < groups; ++g) {
    const T* e = plane(1, index, g);
    Vec<T> sum{};
    each_column_strip(block, {0, block.columns.size()}, [&](int64_t c, int64_t end, int64_t at) {
      const T* f = tile.factors + at;
      Vec<T> partial{};
      for (; c < end; ++c)
        for (int v = 0; v < NV; ++v) {
          T* out = mixed + c * lanes + v * W;
          const Vec<T> x = load(e + c * lanes + v * W);
          store(out, g == 0 ? x * mix[g] : load(out) + x * mix[g]);
          const Vec<T> value = load(tile.entries + (key[c] - block.keys.begin) * lanes + v * W);
          partial += x * (exponentials ? value * load(f + v * W) : softmax ? exp<T>(value - lse[v]) : value);
        }
      sum += partial;
    });
    if (!wanted) continue;
    part[g] = 0;
    for (int i = 0; i < W; ++i) part[g] += sum[i];
  }
}

// sum_V P w E where the tile holds exponentials: P = e f.
template <typename T>
template <typename Op, int NV>
void Engine<T>::plain_delta(int64_t index, const Tile<Op>& tile, const T* gradient, Vec<T>* delta) {
  constexpr int lanes = NV * W;
  const Block& block = blocks_[index];
  const int32_t* key = samples_[block.sample].key_of_column.data() + block.columns.begin;
  each_column_strip(block, {0, block.columns.size()}, [&](int64_t c, int64_t end, int64_t at) {
    const T* f = tile.factors + at;
    Vec<T> partial[NV] = {};
    for (; c < end; ++c)
      for (int v = 0; v < NV; ++v)
        partial[v] += load(tile.entries + (key[c] - block.keys.begin) * lanes + v * W) *
                      load(gradient + c * lanes + v * W);
    for (int v = 0; v < NV; ++v) delta[v] += partial[v] * load(f + v * W);
  });
  for (int v = 0; v < NV; ++v) delta[v] *= head_weight();
}

// X where the tile holds scores, [columns, lanes], and its sum; x may be the gradient's own place.
template <typename T>
template <typename Op, int NV>
void Engine<T>::entry_terms(int64_t index, int64_t head, const Tile<Op>& tile, const T* gradient, T* x,
                            Vec<T>* delta) {
  constexpr int lanes = NV * W;
  const Block& block = blocks_[index];
  const int32_t* key = samples_[block.sample].key_of_column.data() + block.columns.begin;
  const bool each = call_.heads == kEach, softmax = call_.normalize != kScores;
  const T* log_a = plane(0, index, 0);
  Vec<T> lse[NV] = {};
  if (softmax) log_sum_exps<NV>(index, head, lse);
  for (int64_t c = 0; c < block.columns.size(); ++c)
    for (int v = 0; v < NV; ++v) {
      const Vec<T> e = load(gradient + c * lanes + v * W) * head_weight();
      const Vec<T> value = load(tile.entries + (key[c] - block.keys.begin) * lanes + v * W);
      Vec<T> share = all<T>(T(1));
      if (softmax && !call_.in_logs) share = exp<T>(value - lse[v]);
      if (softmax && call_.in_logs && !each) {
        const Vec<T> mass = call_.normalize == kVisual ? load(this->mass(index, 0) + v * W) : Vec<T>{};
        share = exp<T>(value - lse[v] - load(log_a + c * lanes + v * W) - mass);
      }
      const Vec<T> term = e != 0 ? share * e : Vec<T>{};
      store(x + c * lanes + v * W, term);
      if (softmax) delta[v] += term;
    }
}

// Takes dS of two neighbouring keys at a time, and writes it as the products want it. Reals: two lines. Pairs:
// the pairs along the keys (what dq needs), then one line of pairs along the lanes for each key (dk); dS of a
// row sums to 0 over the keys, and dq of keys with much in common lives on that, so what one key loses by
// rounding is carried to the next.
template <typename Op, int NV, typename T = typename Op::Real> class SlopeWriter {
 public:
  explicit SlopeWriter(T* out) : out_(out) {}
  void write(const Vec<T>* first, const Vec<T>* second) {
    constexpr int W = kWidth<T>, lanes = NV * W;
    for (int v = 0; v < NV; ++v) {
      if constexpr (!Op::pairs) {
        store(out_ + v * W, first[v]);
        store(out_ + lanes + v * W, second[v]);
      }
#ifdef __AVX512BF16__
      else {
        const Vec<T> x = first[v] + lost_[v];
        const Rounded low(x);
        const Vec<T> y = second[v] + (x - low.value());
        const Rounded high(y);
        lost_[v] = y - high.value();
        store(out_ + v * W, (Vec<T>)pack(low, high));
        auto* rows = reinterpret_cast<BFloat16Pair*>(out_ + lanes) + v * W / 2;
        low.write(rows);
        high.write(rows + lanes / 2);
      }
#endif
    }
    out_ += 2 * lanes;
  }

 private:
  T* out_;
  Vec<T> lost_[NV] = {};
};

// One strip of keys of one block: dS to `slopes`, [keys, lanes], and its part of dq.
template <typename T>
template <typename Op, int NV>
void Engine<T>::strip_gradient(const Pass& pass, int64_t index, int64_t head, Range strip,
                               Scratch& scratch, int64_t place, T* slopes) {
  static_assert(kGranule % 2 == 0, "strips hold whole pairs of keys");
  constexpr int lanes = NV * W;
  const Block& block = blocks_[index];
  const FaSide& from = call_.student;
  const Range keys = strip.clip(block.keys);
  if (keys.size() <= 0) return;
  const Sample& sample = samples_[block.sample];
  const int32_t* column = sample.column_of_key.data();
  // The line of a map that belongs to key k; null for keys that are no column in reach of the block.
  auto entries = [&](const T* map, int64_t k) {
    const int64_t c = column[k] - block.columns.begin;
    return column[k] >= 0 && c >= 0 && c < block.columns.size() ? map + c * lanes : nullptr;
  };
  const bool wanted = call_.wanted & kWantQ;
  const auto transposed = wanted ? transposed_keys<Op>(block.sample, head) : Rows<typename Op::Element>{};
  const auto end = static_cast<int64_t>(sample.key.size());
  auto soon = [&](int64_t k) {  // the keys that dq multiplies in a moment
    for (int64_t row = Op::pairs ? k / 2 : k; wanted && k < end && row < (Op::pairs ? k / 2 + 1 : k + 2); ++row)
      prefetch(transposed.first + row * transposed.stride, from.size);
  };
  const auto tile = this->tile<Op>(attention(pass, index, head), block);
  const auto* in = tile.entries + (keys.begin - block.keys.begin) * lanes;
  // Queries of pairs are as they were given, without the factor that dk contains: dS gets it here.
  const T factor = Op::pairs ? query_factor(from) : T(1);
  Vec<T> delta[NV];
  for (int v = 0; v < NV; ++v) delta[v] = load(scratch.delta.get() + place * 3 * W + v * W) * factor;
  SlopeWriter<Op, NV> out(slopes);
  auto each = [&](auto slope) {
    for (int64_t k = keys.begin; k < keys.end; k += 2) {
      soon(k);
      Vec<T> two[2][NV];
      for (int64_t n = 0; n < 2; ++n, in += lanes) slope(k + n, two[n]);
      out.write(two[0], two[1]);
    }
  };

  if (keeps_exponentials(from)) {  // with P = e f: dS = e (f w E - f delta)
    const T* gradient = entry_gradients(index, head, scratch);
    const T* factors = tile.factors + (strip.begin / kStep - block.first_strip()) * lanes;
    Vec<T> scale[NV];
    for (int v = 0; v < NV; ++v) {
      scale[v] = load(factors + v * W) * (head_weight() * factor);
      delta[v] *= load(factors + v * W);
    }
    each([&](int64_t k, Vec<T>* x) {
      const T* e = entries(gradient, k);
      for (int v = 0; v < NV; ++v) {
        const Vec<T> slope = e ? load(e + v * W) * scale[v] - delta[v] : -delta[v];
        x[v] = load(in + v * W) * slope;
      }
    });
  } else {  // dS = (X - P delta) slope of the soft cap / temperature
    const bool softmax = call_.normalize != kScores;
    const T inside = from.softcap ? T(call_.temperature / from.softcap) : T(0);
    const T outside = from.softcap ? T(1 / call_.temperature) : T(1);
    Vec<T> lse[NV] = {};
    if (softmax) log_sum_exps<NV>(index, head, lse);
    each([&](int64_t k, Vec<T>* x) {
      const T* term = entries(scratch.column.get(), k);
      for (int v = 0; v < NV; ++v) {
        const Vec<T> value = load(in + v * W);
        x[v] = softmax ? -exp<T>(value - lse[v]) * delta[v] : Vec<T>{};
        if (term) x[v] += load(term + v * W) * factor;
        if (inside != 0) x[v] *= outside * (1 - min<T>((value * inside) * (value * inside), all<T>(T(1))));
      }
    });
  }
  if (wanted)
    query_gradient<Op, NV>(keys, end, transposed, slopes, scratch.d_q.get() + place * 3 * W * from.size);
}

// dq^T [D, lanes] += K^T dS^T over one strip.
template <typename T>
template <typename Op, int NV>
void Engine<T>::query_gradient(Range keys, int64_t end, Rows<typename Op::Element> transposed,
                               const T* slopes, T* d_q) {
  constexpr int lanes = NV * W, per = Op::pairs ? 2 : 1;
  const int64_t length = (std::min(keys.end, end) - keys.begin + per - 1) / per;
  const Stretch<typename Op::Element> stretch{transposed.first + keys.begin / per * transposed.stride,
                                              reinterpret_cast<const typename Op::Element*>(slopes), length,
                                              1, 2};
  multiply<Op, NV, true, kEvenRows<NV>>(&stretch, 1, {transposed.stride, per * lanes, lanes}, d_q,
                                        call_.student.size);
}

// dq^T [D, lanes] of one head and block to the rows of dq. Each belongs to one block and is written once,
// unless a mixed head gets its gradient from several chunks of groups.
template <typename T>
void Engine<T>::store_query_gradient(int64_t index, int64_t head, const T* in) {
  const FaSide& from = call_.student;
  const Block& block = blocks_[index];
  const Sample& s = samples_[block.sample];
  T factor = query_factor(from);
  with_product(from, [&](auto op) { if (decltype(op)::pairs) factor = 1; });
  for (int64_t i = 0; i < block.live; ++i) {
    T* row = static_cast<T*>(call_.d_q) +
             ((s.b * from.heads + head) * call_.rows + s.row[block.first + i]) * from.size;
    for (int64_t d = 0; d < from.size; ++d)
      row[d] = factor * in[d * block.lanes + i] + (adds_queries_ ? row[d] : T(0));
  }
}

// Adds to dk of one strip of keys what some heads and blocks of rows give, slopes(head, block, key) being dS
// from that key on; kFresh: to zero, not to what lies there. Every element is one chain of additions over heads,
// blocks and rows, however the calls are cut.
template <typename T>
template <typename Op, bool kFresh, typename Slopes>
void Engine<T>::key_gradient(const Pass& pass, Range heads, Range part, Range keys, int64_t sample,
                             Slopes slopes, Scratch& scratch) {
  using Element = typename Op::Element;
  const FaSide& from = call_.student;
  const Sample& s = samples_[sample];
  const int64_t stride = packed_stride<T>(from.size), padded = round_up(from.size, W);
  const int64_t key_head = heads.begin / (from.heads / from.key_heads);
  auto* stretches = reinterpret_cast<Stretch<Element>*>(scratch.stretches.get());
  int64_t begin[kStep / kGranule + 1], count = 0;
  const int64_t granules = keys.size() / kGranule;
  for (int64_t n = 0; n < granules; ++n) {
    const int64_t k = keys.begin + n * kGranule;
    begin[n] = count;
    for (int64_t h = heads.begin; h < heads.end; ++h)
      for (int64_t i = part.begin; i < part.end; ++i) {
        const Block& block = blocks_[i];
        if (block.sample != sample || k < block.keys.begin || k >= block.keys.end) continue;
        const int64_t lanes = block.lanes;
        const auto* ds = reinterpret_cast<const Element*>(slopes(h, i, k));
        const Element* queries = packed_queries<Op>(pass, i, h);
        if constexpr (Op::pairs)
          stretches[count++] = {ds + lanes, queries, (block.live + 1) / 2, lanes / 2, 2 * lanes};
        else stretches[count++] = {ds, queries, block.live, lanes, 2 * lanes};
      }
  }
  begin[granules] = count;
  const int64_t live = std::min(keys.end, static_cast<int64_t>(s.key.size())) - keys.begin;
  if ((count == 0 && !kFresh) || live <= 0) return;

  // Straight to dk where its rows are whole vectors one after the other, else by way of a tile. Tiles are
  // computed whole: in pieces, one could start at an odd row, whose pairs are stored elsewhere.
  const bool straight = padded == from.size && s.consecutive && live == keys.size();
  T* tile = straight ? key_row(s, key_head, keys.begin) : scratch.d_k.get();
  const int64_t apart = straight ? from.size : stride;
  if (!straight && !kFresh)
    for (int64_t k = 0; k < live; ++k) {
      std::copy_n(key_row(s, key_head, keys.begin + k), from.size, tile + k * apart);
      std::fill(tile + k * apart + from.size, tile + k * apart + padded, T(0));
    }
  auto columns = [&](auto nv, int64_t d) {
    for (int64_t n = 0; n < granules; ++n) {
      for (int64_t i = begin[n + 1]; n + 1 < granules && i < begin[n + 2]; ++i)
        for (int64_t k = 0; k < kGranule; k += 2)
          prefetch(stretches[i].a + k / 2 * stretches[i].a_two, 2 * stretches[i].a_one);
      if (!kFresh && d == 0 && n + 1 < granules)
        for (int64_t k = (n + 1) * kGranule; k < (n + 2) * kGranule; ++k) prefetch(tile + k * apart, padded);
      multiply<Op, decltype(nv)::value, !kFresh>(stretches + begin[n], begin[n + 1] - begin[n],
                                              {1, stride, apart}, tile + n * kGranule * apart + d, kGranule,
                                              d);
    }
  };
  int64_t d = 0;
  for (; d + 2 * W <= padded; d += 2 * W) columns(Constant<2>(), d);
  if (d < padded) columns(Constant<1>(), d);
  if (!straight)
    for (int64_t k = 0; k < live; ++k)
      std::copy_n(tile + k * apart, from.size, key_row(s, key_head, keys.begin + k));
}

template <typename T> T* Engine<T>::key_row(const Sample& s, int64_t key_head, int64_t k) {
  return static_cast<T*>(call_.d_k) +
         ((s.b * call_.student.key_heads + key_head) * call_.length + s.key[k]) * call_.student.size;
}

}  // namespace fastalign::FASTALIGN_ISA
