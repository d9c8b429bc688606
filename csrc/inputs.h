// Reading q and k: any strides, float16, bfloat16, float32 or float64, into packed rows of reals.
#pragma once

#include <cstring>

#include "align.h"
#include "memory.h"

namespace fastalign::FASTALIGN_ISA {

struct Half { uint16_t bits; };

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
// The bits of the nearest bfloat16, ties to even; NaN stays NaN.
inline uint16_t narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  return static_cast<uint16_t>(x != x ? 0x7fc0 : rounded >> 16);
}
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }
// The exponent moves by 127 - 15 by a multiplication, which gives subnormal halves their value too.
inline float widen(Half x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t finite = [](float y) { uint32_t u; std::memcpy(&u, &y, 4); return u; }(
      from_bits(magnitude) * from_bits(0x77800000));  // 2^112
  const uint32_t value = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite;
  return from_bits(value | uint32_t(x.bits & 0x8000) << 16);
}

// out[d] = factor * in[d * stride], the rest of the padded row 0.
template <typename T, typename In>
inline void read_row(const In* in, int64_t stride, int64_t size, int64_t padded, T factor, T* out) {
  if (stride == 1)
    for (int64_t d = 0; d < size; ++d) out[d] = T(widen(in[d])) * factor;
  else
    for (int64_t d = 0; d < size; ++d) out[d] = T(widen(in[d * stride])) * factor;
  for (int64_t d = size; d < padded; ++d) out[d] = T(0);
}

// Row r of head h of sample b.
template <typename T>
void read_row(const FaTensor& x, int64_t b, int64_t h, int64_t r, int64_t size, int64_t padded, T factor,
              T* out) {
  const int64_t at = b * x.stride[0] + h * x.stride[1] + r * x.stride[2];
  auto as = [&](auto type) {
    using In = decltype(type);
    read_row(static_cast<const In*>(x.data) + at, x.stride[3], size, padded, factor, out);
  };
  switch (x.dtype) {
    case kFloat32: return as(float());
    case kFloat64: return as(double());
    case kFloat16: return as(Half());
    default: return as(BFloat16());
  }
}

// Row r of head h of sample b in bfloat16, as `words` pairs of neighbours; the rest of the row 0.
inline void read_pairs(const FaTensor& x, int64_t b, int64_t h, int64_t r, int64_t words, int64_t padded,
                       BFloat16Pair* out) {
  const auto* in = static_cast<const BFloat16*>(x.data) + b * x.stride[0] + h * x.stride[1] + r * x.stride[2];
  if (x.stride[3] == 1) std::memcpy(out, in, size_t(words) * sizeof *out);
  else
    for (int64_t d = 0; d < words; ++d, in += 2 * x.stride[3])
      out[d].bits = static_cast<int32_t>(in[0].bits | uint32_t(in[x.stride[3]].bits) << 16);
  for (int64_t d = words; d < padded; ++d) out[d].bits = 0;
}

// Two rows of pairs along d, [2, words], as pairs of rows: [2 words], low the first row.
inline void interleave(const BFloat16Pair* first, const BFloat16Pair* second, int64_t words,
                       BFloat16Pair* out) {
  for (int64_t d = 0; d < words; ++d) {
    const auto a = static_cast<uint32_t>(first[d].bits), b = static_cast<uint32_t>(second[d].bits);
    out[2 * d].bits = static_cast<int32_t>((a & 0xffff) | b << 16);
    out[2 * d + 1].bits = static_cast<int32_t>(a >> 16 | (b & 0xffff0000));
  }
}

// Length of a packed row of `size`: whole vectors, and an odd number of cache lines, so that the same
// column of consecutive rows does not fall into the same cache set.
template <typename T> int64_t packed_stride(int64_t size) {
  const int64_t per_line = kLine / int64_t(sizeof(T));
  const int64_t lines = round_up(size, per_line) / per_line;
  return (lines + (lines + 1) % 2) * per_line;
}

}  // namespace fastalign::FASTALIGN_ISA
