// C[m, n] += sum_k A(m, k) B[k, n]: the one matrix product behind scores, dq and dk.
//
// A is read one element at a time and broadcast, at any two strides, so that it may lie transposed; rows
// of B and C are contiguous and whole vectors. A tile of C stays in registers over the whole sum:
//
//     scores  S^T [keys, rows] = K [keys, D]     Q^T [D, rows]
//     dq^T    [D, rows]       += K^T [D, keys]   dS^T [keys, rows]
//     dk      [keys, D]       += dS^T [keys, rows] Q [rows, D]
//
// With Pairs, k counts pairs: an element of A or B is two bfloat16 that are neighbours along the sum.
//
// Registers: kTileRows x NV accumulators, NV of B, one of A: 4 x 3 + 3 + 1 of AVX2's 16, 8 x 3 + 3 + 1 of 32.
// Each element of C is one chain of multiply-adds in the order of k, whatever the tile: no result
// depends on how the work was cut.
#pragma once

#include <algorithm>

#include "vec.h"

namespace fastalign::FASTALIGN_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

// Rows of the tile that goes with NV vectors of columns.
template <int NV> constexpr int kTileRows = NV == 1 ? 8 : (kRegisters - NV - 1) / NV;

// One stretch of the sum: A and B from here, for `length` values of k. Row m of A begins m / 2 * a_two +
// m % 2 * a_one elements further: two distances, because a pair of rows may share its storage. Where a_two is
// not 2 * a_one, tiles must begin at even rows.
template <typename Element> struct Stretch {
  const Element* a;
  const Element* b;
  int64_t length, a_one, a_two;
};

struct Strides {
  int64_t a_k, b_k, c_m;
};

template <typename Op, int MR, int NV, typename Start, typename Finish>
inline void tile(const Stretch<typename Op::Element>* stretches, int64_t count, int64_t row, int64_t b_at,
                 const Strides& s, typename Op::Real* c, Start start, Finish finish) {
  using T = typename Op::Real;
  using Element = typename Op::Element;
  constexpr int W = kWidth<T>;
  Vec<T> sum[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) sum[m][n] = start(c + m * s.c_m + n * W);
  for (int64_t piece = 0; piece < count; ++piece) {
    const int64_t one = stretches[piece].a_one, two = stretches[piece].a_two;
    const Element* a = stretches[piece].a + row / 2 * two + row % 2 * one;
    const Element* b = stretches[piece].b + b_at;
#pragma GCC unroll 4
    for (int64_t k = stretches[piece].length; k > 0; --k, a += s.a_k, b += s.b_k) {
      typename Op::Elements right[NV];
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) right[n] = Op::read(b + n * W);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const auto left = Op::broadcast(a[m / 2 * two + m % 2 * one]);
#pragma GCC unroll 4
        for (int n = 0; n < NV; ++n) sum[m][n] = Op::add(sum[m][n], left, right[n]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) store(c + m * s.c_m + n * W, finish(sum[m][n], n));
}

// Asks for `count` elements before they are needed, into the first or the second cache; an address past the end
// of an array does no harm.
template <int kCache = 1, typename Element> inline void prefetch(const Element* p, int64_t count) {
  constexpr int64_t line = 64;
  for (int64_t at = 0; at < count * int64_t(sizeof *p); at += line)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + at, 0, 4 - kCache);
}

// `rows` rows of C, NV vectors wide: full tiles, then the rest in halves.
template <typename Op, int MR, int NV, typename Start, typename Finish>
inline void strip(const Stretch<typename Op::Element>* stretches, int64_t count, int64_t b_at,
                  const Strides& s, typename Op::Real* c, int64_t rows, int64_t m, Start start,
                  Finish finish) {
  for (; m + MR <= rows; m += MR) {
    if (s.a_k == 1 && count == 1)  // rows of A used once, as the scores' keys: the next tile's
      for (int64_t next = m + MR; next < std::min<int64_t>(rows, m + 2 * MR); ++next)
        prefetch(stretches->a + next * stretches->a_one, stretches->length);
    tile<Op, MR, NV>(stretches, count, m, b_at, s, c + m * s.c_m, start, finish);
  }
  if constexpr (MR > 1)
    if (m < rows) strip<Op, MR / 2, NV>(stretches, count, b_at, s, c, rows, m, start, finish);
}

// Tiles of this many rows leave no rest where the rows are a multiple of 8, as a head's dimension.
template <int NV> constexpr int kEvenRows = kTileRows<NV> >= 8 ? 8 : 4;

// C [rows, NV vectors] (+)= the sum over all stretches; each vector of column n passes through
// finish(sum, n) before it is stored.
template <typename Op, int NV, bool kAdd, int MR = kTileRows<NV>, typename Finish>
inline void multiply(const Stretch<typename Op::Element>* stretches, int64_t count, const Strides& s,
                     typename Op::Real* c, int64_t rows, int64_t b_at, Finish finish) {
  using T = typename Op::Real;
  auto start = [](const T* p) { if constexpr (kAdd) return load(p); else return (void)p, Vec<T>{}; };
  strip<Op, MR, NV>(stretches, count, b_at, s, c, rows, 0, start, finish);
}
template <typename Op, int NV, bool kAdd, int MR = kTileRows<NV>>
inline void multiply(const Stretch<typename Op::Element>* stretches, int64_t count, const Strides& s,
                     typename Op::Real* c, int64_t rows, int64_t b_at = 0) {
  multiply<Op, NV, kAdd, MR>(stretches, count, s, c, rows, b_at, [](auto sum, int) { return sum; });
}

}  // namespace fastalign::FASTALIGN_ISA
