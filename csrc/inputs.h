// Reading q and k: any strides, float16, bfloat16, float32 or float64, into packed rows of reals.
#pragma once

#include <cstring>

#include "align.h"
#include "memory.h"

namespace fastalign::FASTALIGN_ISA {

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
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

// Length of a packed row of `size`: whole vectors, and an odd number of cache lines, so that the same
// column of consecutive rows does not fall into the same cache set.
template <typename T> int64_t packed_stride(int64_t size) {
  const int64_t per_line = kLine / int64_t(sizeof(T));
  const int64_t lines = round_up(size, per_line) / per_line;
  return (lines + (lines + 1) % 2) * per_line;
}

}  // namespace fastalign::FASTALIGN_ISA
