// Scores and softmax of one head for one block of rows: tiles [keys, lanes], one row a lane.
//
// With rows along the lanes every reduction of a softmax is a vector operation between keys: no sum
// across lanes, and a key that is not compared, or a masked one, is a line of the tile.
#pragma once

#include "inputs.h"
#include "select.h"

namespace fastalign::FASTALIGN_ISA {

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

// Rows of one operand: row k begins k * stride elements after the first.
template <typename Element> struct Rows {
  const Element* first;
  int64_t stride;
};

// S of one strip of keys, hidden entries `hidden`, and its maximum over the keys in top[NV]. Keys from
// `end` on do not exist: they are hidden, too. `factor` belongs to pairs, whose queries are not scaled.
template <typename Op, int NV, typename T = typename Op::Real>
void score_strip(Rows<typename Op::Element> keys, int64_t end, const typename Op::Element* queries,
                 int64_t words, Range strip, const uint64_t* seen, Cap<T> cap, T factor, T hidden, T* s,
                 Vec<T>* top) {
  constexpr int W = kWidth<T>, lanes = NV * W;
  const Stretch<typename Op::Element> stretch{keys.first + strip.begin * keys.stride, queries, words,
                                              keys.stride, 2 * keys.stride};
  const int64_t live = std::min(strip.end, end) - strip.begin;
  for (int v = 0; v < NV; ++v) top[v] = all<T>(-kInfinity<T>);
  multiply<Op, NV, false>(&stretch, 1, {1, lanes, lanes}, s, live, 0, [&](Vec<T> x, int v) {
    if constexpr (Op::pairs) x *= factor;
    if (cap.inside != 0) x = cap.outside * tanh<T>(x * cap.inside);
    top[v] = max<T>(top[v], x);
    return x;
  });
  if (live == strip.size() && std::all_of(seen, seen + live, [](uint64_t bits) { return ~bits == 0; }))
    return;
  for (int v = 0; v < NV; ++v) top[v] = all<T>(-kInfinity<T>);
  for (int64_t j = 0; j < strip.size(); ++j, s += lanes)
    for (int v = 0; v < NV; ++v) {
      const Vec<T> x = where_seen<T>(seen[j], v, load(s + v * W), hidden);
      if (~seen[j]) store(s + v * W, x);
      top[v] = max<T>(top[v], x);
    }
}

// The sums over keys of exponentials, as computed and as stored.
template <typename T, int NV> struct Sums {
  Vec<T> exact[NV] = {}, stored[NV] = {};
};

// exp(S - m) of `count` keys, added to the sums, and unless `out` is null stored there.
template <typename T, int NV, typename Stored>
void exponentials(int64_t count, const Vec<T>* m, const T* s, Stored* out, Sums<T, NV>& sums) {
  constexpr int W = kWidth<T>, lanes = NV * W;
  Vec<T> from[NV];
  for (int v = 0; v < NV; ++v) from[v] = base<T>(m[v]);
  constexpr bool same = std::is_same_v<T, Stored>;
  Sums<T, NV> part;
  auto each = [&](auto keep) {
    for (int64_t j = 0; j < count; ++j, s += lanes)
      for (int v = 0; v < NV; ++v) {
        const Vec<T> e = exp_from<T>(load(s + v * W), from[v]);
        part.exact[v] += e;
        keep(j * lanes + v * W, v, e);
      }
  };
  if (!out) each([](int64_t, int, Vec<T>) {});
  else if constexpr (same) each([&](int64_t at, int, Vec<T> e) { store(out + at, e); });
#ifdef __AVX512BF16__
  else
    each([&](int64_t at, int v, Vec<T> e) {
      const Rounded rounded(e);
      rounded.write(out + at);
      part.stored[v] += rounded.value();
    });
#endif
  for (int v = 0; v < NV; ++v) {
    sums.exact[v] += part.exact[v];
    sums.stored[v] += same ? part.exact[v] : part.stored[v];
  }
}

// The softmax's running maximum and sums over strips. Each strip's exponentials refer to the maximum so
// far, its base; the factor that turns them into probabilities is known at the end.
template <typename T, int NV> struct Running {
  Vec<T> top[NV];
  Sums<T, NV> sums;

  Running() { for (auto& x : top) x = all<T>(-kInfinity<T>); }
  // The maximum with one more strip, in finite[NV] 0 for rows that saw nothing yet.
  void raise(const Vec<T>* strip_top, Vec<T>* finite) {
    for (int v = 0; v < NV; ++v) {
      const Vec<T> old = top[v];
      top[v] = max<T>(old, strip_top[v]);
      finite[v] = top[v] == -kInfinity<T> ? Vec<T>{} : top[v];
      const Vec<T> less = exp<T>(old - finite[v]);
      sums.exact[v] *= less;
      sums.stored[v] *= less;
    }
  }
};

// Queries [lanes, size] transposed to [size, lanes]; lanes without a row are 0.
template <typename E>
inline void transpose(const E* in, int64_t in_stride, int64_t live, int64_t size, int64_t lanes, E* out) {
  for (int64_t d = 0; d < size; ++d)
    for (int64_t i = live; i < lanes; ++i) out[d * lanes + i] = E{};
  constexpr int64_t tile = 8;
  for (int64_t d0 = 0; d0 < size; d0 += tile)
    for (int64_t i = 0; i < live; ++i)
      for (int64_t d = d0; d < std::min(size, d0 + tile); ++d)
        out[d * lanes + i] = in[i * in_stride + d];
}

}  // namespace fastalign::FASTALIGN_ISA
