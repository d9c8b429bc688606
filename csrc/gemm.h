// C[m, n] += sum_k A(m, k) B[k, n]: the one matrix product behind scores, dq and dk.
//
// A is read one element at a time and broadcast, at any two strides, so that it may lie transposed; rows
// of B and C are contiguous and whole vectors. A tile of C stays in registers over the whole sum:
//
//     scores  S^T [keys, rows] = K [keys, D]     Q^T [D, rows]
//     dq^T    [D, rows]       += K^T [D, keys]   dS^T [keys, rows]
//     dk      [keys, D]       += dS^T [keys, rows] Q [rows, D]
//
// Registers: kTileRows x NV accumulators, NV of B, one of A: 4 x 3 + 3 + 1 of AVX2's 16, 8 x 3 + 3 + 1 of 32.
// Each element of C is one chain of multiply-adds in the order of k, whatever the tile: no result
// depends on how the work was cut.
#pragma once

#include "vec.h"

namespace fastalign::FASTALIGN_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

// Rows of the tile that goes with NV vectors of columns.
template <int NV> constexpr int kTileRows = NV == 1 ? 8 : (kRegisters - NV - 1) / NV;

// One stretch of the sum: A (rows a_m apart) and B from here, for `length` values of k.
template <typename T> struct Stretch {
  const T* a;
  const T* b;
  int64_t length, a_m;
};

struct Strides {
  int64_t a_k, b_k, c_m;
};

template <typename T, int MR, int NV, typename Start>
inline void tile(const Stretch<T>* stretches, int64_t count, int64_t row, int64_t b_at,
                 const Strides& s, T* c, Start start) {
  constexpr int W = kWidth<T>;
  Vec<T> sum[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) sum[m][n] = start(c + m * s.c_m + n * W);
  for (int64_t piece = 0; piece < count; ++piece) {
    const int64_t a_m = stretches[piece].a_m;
    const T* a = stretches[piece].a + row * a_m;
    const T* b = stretches[piece].b + b_at;
    for (int64_t k = stretches[piece].length; k > 0; --k, a += s.a_k, b += s.b_k) {
      Vec<T> right[NV];
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) right[n] = load(b + n * W);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const Vec<T> left = all(a[m * a_m]);
#pragma GCC unroll 4
        for (int n = 0; n < NV; ++n) sum[m][n] += left * right[n];
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) store(c + m * s.c_m + n * W, sum[m][n]);
}

// `rows` rows of C, NV vectors wide: full tiles, then the rest in halves.
template <typename T, int MR, int NV, typename Start>
inline void strip(const Stretch<T>* stretches, int64_t count, int64_t b_at, const Strides& s, T* c,
                  int64_t rows, int64_t m, Start start) {
  for (; m + MR <= rows; m += MR)
    tile<T, MR, NV>(stretches, count, m, b_at, s, c + m * s.c_m, start);
  if constexpr (MR > 1)
    if (m < rows) strip<T, MR / 2, NV>(stretches, count, b_at, s, c, rows, m, start);
}

// C [rows, NV vectors] (+)= the sum over all stretches.
template <typename T, int NV, bool kAdd>
inline void multiply(const Stretch<T>* stretches, int64_t count, const Strides& s, T* c,
                     int64_t rows, int64_t b_at = 0) {
  auto start = [](const T* p) { if constexpr (kAdd) return load(p); else return (void)p, Vec<T>{}; };
  strip<T, kTileRows<NV>, NV>(stretches, count, b_at, s, c, rows, 0, start);
}

}  // namespace fastalign::FASTALIGN_ISA
