// Scores and softmax of one head for one block of rows: tiles [keys, lanes], one row a lane.
//
// With rows along the lanes every reduction of a softmax is a vector operation between keys: no sum
// across lanes, and a key that is not compared, or a masked one, is a line of the tile.
#pragma once

#include "select.h"

namespace fastalign::FASTALIGN_ISA {

// Keys per step: a tile of scores and the keys that it multiplies stay in the first two cache levels.
constexpr int64_t kStep = 96 / kGranule * kGranule;

// Partial sums end here, so that a sum of n terms loses log2(kPartial) + n / kPartial roundings, not n.
constexpr int64_t kPartial = 64;

// x where the lane's bit is set, else `other`; lanes of vector v of a block.
template <typename T> inline Vec<T> where_seen(uint64_t bits, int v, Vec<T> x, T other) {
  using I = typename Lanes<T>::scalar_int;
  constexpr int W = kWidth<T>;
  if (~bits == 0) return x;
  Ints<T> lane;
  for (int i = 0; i < W; ++i) lane[i] = I(1) << i;
  const Ints<T> mine = Ints<T>{} + I((bits >> (v * W)) & ((uint64_t(1) << W) - 1));
  return (mine & lane) != 0 ? x : all<T>(other);
}

// How raw products become scores: S = cap tanh(x / cap) / temperature, or x as it is (the scale and the
// temperature are in the packed queries already).
template <typename T> struct Cap {
  T inside = 0, outside = 0;  // 1 / cap, cap / temperature; 0: none
};

// S of the keys in `ranges`, hidden entries `hidden`, and its maximum over the keys in top[NV].
template <typename T, int NV>
void scores(const T* keys, int64_t key_stride, const T* queries, int64_t size, const Block& block,
            const std::vector<Range>& ranges, const uint64_t* masks, Cap<T> cap, T hidden, T* s,
            Vec<T>* top) {
  constexpr int W = kWidth<T>, lanes = NV * W;
  for (int v = 0; v < NV; ++v) top[v] = all<T>(-kInfinity<T>);
  for (const Range& range : ranges) {
    const Range part = range.clip(block.keys);
    for (int64_t from = part.begin; from < part.end; from += kStep) {
      const int64_t count = std::min(kStep, part.end - from);
      T* out = s + (from - block.keys.begin) * lanes;
      const Stretch<T> stretch{keys + from * key_stride, queries, size, key_stride};
      multiply<T, NV, false>(&stretch, 1, {1, lanes, lanes}, out, count);
      const uint64_t* seen = masks + (from - block.keys.begin);
      for (int64_t j = 0; j < count; ++j, out += lanes)
        for (int v = 0; v < NV; ++v) {
          Vec<T> x = load(out + v * W);
          if (cap.inside != 0) x = cap.outside * tanh<T>(x * cap.inside);
          if (cap.inside != 0 || ~seen[j]) store(out + v * W, x = where_seen<T>(seen[j], v, x, hidden));
          top[v] = max<T>(top[v], x);
        }
    }
  }
}

// sum over the keys of exp(S - m) per lane; kKeep: S is replaced by the exponential.
template <typename T, int NV, bool kKeep>
void exponentials(const Block& block, const std::vector<Range>& ranges, const Vec<T>* m, T* s,
                  Vec<T>* sum) {
  constexpr int W = kWidth<T>, lanes = NV * W;
  for (int v = 0; v < NV; ++v) sum[v] = Vec<T>{};
  for (const Range& range : ranges) {
    const Range part = range.clip(block.keys);
    for (int64_t from = part.begin; from < part.end; from += kPartial) {
      const int64_t to = std::min(part.end, from + kPartial);
      Vec<T> partial[NV] = {};
      T* x = s + (from - block.keys.begin) * lanes;
      for (int64_t j = from; j < to; ++j, x += lanes)
        for (int v = 0; v < NV; ++v) {
          const Vec<T> e = exp<T>(load(x + v * W) - m[v]);
          if constexpr (kKeep) store(x + v * W, e);
          partial[v] += e;
        }
      for (int v = 0; v < NV; ++v) sum[v] += partial[v];
    }
  }
}

// Queries [lanes, size] transposed to [size, lanes]; lanes without a row are 0.
template <typename T>
inline void transpose(const T* in, int64_t in_stride, int64_t live, int64_t size, int64_t lanes, T* out) {
  for (int64_t d = 0; d < size; ++d)
    for (int64_t i = live; i < lanes; ++i) out[d * lanes + i] = T(0);
  constexpr int64_t tile = 8;
  for (int64_t d0 = 0; d0 < size; d0 += tile)
    for (int64_t i = 0; i < live; ++i)
      for (int64_t d = d0; d < std::min(size, d0 + tile); ++d)
        out[d * lanes + i] = in[i * in_stride + d];
}

}  // namespace fastalign::FASTALIGN_ISA
