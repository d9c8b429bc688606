// Vectors of one register as a value type, and the elementary functions on them.
//
// GCC's and Clang's vector extensions: the same source compiles to AVX-512, AVX2, SSE and NEON, with
// arithmetic, comparison and selection written as on scalars. The width is the widest register that the
// flags of the translation unit allow; the kernels are built once per instruction set (kernels.cpp).
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace fastalign::FASTALIGN_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Lanes<float>::vec is 8 floats on AVX2, and Lanes<float>::ints 8 integers of the same size.
template <typename T> struct Lanes;
template <> struct Lanes<float> {
  using scalar_int = int32_t;
  typedef float vec __attribute__((vector_size(kVectorBytes)));
  typedef float loose __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t ints __attribute__((vector_size(kVectorBytes)));
  static constexpr int width = kVectorBytes / 4;
};
template <> struct Lanes<double> {
  using scalar_int = int64_t;
  typedef double vec __attribute__((vector_size(kVectorBytes)));
  typedef double loose __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t ints __attribute__((vector_size(kVectorBytes)));
  static constexpr int width = kVectorBytes / 8;
};
template <typename T> using Vec = typename Lanes<T>::vec;
template <typename T> using Ints = typename Lanes<T>::ints;
template <typename T> constexpr int kWidth = Lanes<T>::width;

template <typename T> inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::loose*>(p);
}
template <typename T> inline void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename Lanes<T>::loose*>(p) = x;
}
template <typename T> inline Vec<T> all(T x) { return x - Vec<T>{}; }
// b where they are equal or one of them is no number: what x86 has one instruction for, of which a compiler makes
// a comparison and a choice.
template <typename T> inline Vec<T> max(Vec<T> a, Vec<T> b) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, float>) return (Vec<T>)_mm512_max_ps((__m512)a, (__m512)b);
  else return (Vec<T>)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) return (Vec<T>)_mm256_max_ps((__m256)a, (__m256)b);
  else return (Vec<T>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}
template <typename T> inline Vec<T> min(Vec<T> a, Vec<T> b) { return a < b ? a : b; }
template <typename T> inline Vec<T> abs(Vec<T> a) { return a < 0 ? -a : a; }

template <typename T> constexpr T kInfinity = std::numeric_limits<T>::infinity();

// How a matrix product multiplies. Plain: reals. Pairs: one element is two neighbouring bfloat16 of the
// summed dimension, multiplied and added to a float by one instruction: half the elements of the sum.
// Stored: what a head's attention is kept as, reals, or for Pairs perhaps bfloat16, as its inputs are.
template <typename T> struct Plain {
  using Real = T;
  using Element = T;
  using Elements = Vec<T>;
  using Stored = T;
  static constexpr bool pairs = false;
  static Elements broadcast(T x) { return all(x); }
  static Elements read(const T* p) { return load(p); }
  static Vec<T> add(Vec<T> sum, Elements a, Elements b) { return sum + a * b; }
};

struct __attribute__((may_alias)) BFloat16Pair { int32_t bits; };
struct __attribute__((may_alias)) BFloat16 { uint16_t bits; };
#ifdef __AVX512BF16__
template <typename Attention> struct Pairs {
  using Real = float;
  using Element = BFloat16Pair;
  using Elements = Ints<float>;
  using Stored = Attention;
  static constexpr bool pairs = true;
  static Elements broadcast(Element x) { return x.bits - Elements{}; }
  static Elements read(const Element* p) { return (Elements)load(reinterpret_cast<const float*>(p)); }
  static Vec<float> add(Vec<float> sum, Elements a, Elements b) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
template <typename T> constexpr bool kHasPairs = std::is_same_v<T, float>;

// A vector of reals rounded to bfloat16: half a vector of bits, and what it is as reals.
struct Rounded {
  __m256i bits;
  explicit Rounded(Vec<float> x) : bits((__m256i)_mm512_cvtneps_pbh((__m512)x)) {}
  Vec<float> value() const { return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16); }
  // Lanes 2 i and 2 i + 1 as one element, half a vector of elements.
  void write(BFloat16Pair* out) const { __builtin_memcpy(out, &bits, sizeof bits); }
  void write(BFloat16* out) const { __builtin_memcpy(out, &bits, sizeof bits); }
};
// Lane i of both as one element, low in the low half.
inline Ints<float> pack(Rounded low, Rounded high) {
  return (Ints<float>)_mm512_or_si512(_mm512_cvtepu16_epi32(low.bits),
                                      _mm512_slli_epi32(_mm512_cvtepu16_epi32(high.bits), 16));
}
inline Vec<float> load(const BFloat16* p) {
  __m256i bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
#else
template <typename T> constexpr bool kHasPairs = false;
#endif

// 1 / n! as a constant of the compiler.
constexpr double inverse_factorial(int n) { return n < 2 ? 1.0 : inverse_factorial(n - 1) / n; }

// What exp and log need to know of a format: bits of the mantissa, the number 1.5 * 2^bits (adding it
// rounds to an integer that then sits in the low bits), the range in which 2^n is normal, ln 2 in two
// parts, how many terms of a series reach half an ulp, and the coefficient of r^k in e^r for |r| <= ln 2 / 2:
// float's are those of least relative error, 3.1e-9; double's are Taylor's, r^14 / 14! = 4e-18.
template <typename T> struct Format;
template <> struct Format<float> {
  static constexpr int mantissa = 23, exp_terms = 6, log_terms = 6;
  static constexpr float exp_term(int k) {
    constexpr float terms[] = {1, 1, 4.999999345e-1f, 1.666652063e-1f, 4.166838805e-2f, 8.368716907e-3f,
                               1.381459859e-3f};
    return terms[k];
  }
  static constexpr int32_t one = 0x3f800000, sqrt_half = 0x3f3504f3;
  static constexpr float round = 12582912.0f, low = -87.33f, high = 88.3f;
  static constexpr float ln2_high = 0.693145751953125f, ln2_low = 1.42860677e-6f;
};
template <> struct Format<double> {
  static constexpr int mantissa = 52, exp_terms = 13, log_terms = 11;
  static constexpr double exp_term(int k) { return inverse_factorial(k); }
  static constexpr int64_t one = 0x3ff0000000000000, sqrt_half = 0x3fe6a09e667f3bcd;
  static constexpr double round = 6755399441055744.0, low = -708.39, high = 709.4;
  static constexpr double ln2_high = 6.93147180369123816490e-1, ln2_low = 1.90821492927058770002e-10;
};

// e^r - 1 for |r| <= ln 2 / 2.
template <typename T> inline Vec<T> near_one(Vec<T> r) {
  using F = Format<T>;
  Vec<T> sum = all<T>(F::exp_term(F::exp_terms));
#pragma GCC unroll 16
  for (int k = F::exp_terms - 1; k >= 1; --k) sum = sum * r + F::exp_term(k);
  return sum * r;
}

// x = n ln 2 + r with |r| <= ln 2 / 2: {2^n, e^r - 1}.
template <typename T> struct Exponential { Vec<T> power, rest; };
template <typename T> inline Exponential<T> exponential(Vec<T> x) {
  using F = Format<T>;
  x = min<T>(max<T>(x, all<T>(F::low)), all<T>(F::high));
  const Vec<T> shifted = x * T(1.44269504088896340736) + F::round;
  const Vec<T> n = shifted - F::round;
  const Vec<T> r = (x - n * F::ln2_high) - n * F::ln2_low;
  const Ints<T> bits = ((Ints<T>)shifted << F::mantissa) + F::one;
  return {(Vec<T>)bits, near_one<T>(r)};
}

// e^x within 1.5 ulp; exactly 0 below the smallest normal number (so that exp(-inf) = 0).
template <typename T> inline Vec<T> exp(Vec<T> x) {
  using F = Format<T>;
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, float>) {  // 2^n is one instruction, which leaves out what is too small
    x = min<T>(x, all<T>(F::high));
    const Vec<T> n = x * T(1.44269504088896340736) + F::round - F::round;
    const Vec<T> y = near_one<T>((x - n * F::ln2_high) - n * F::ln2_low) + 1;
    const auto seen = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(F::low), _CMP_NLT_UQ);
    return (Vec<T>)_mm512_maskz_scalef_ps(seen, (__m512)y, (__m512)n);
  }
#endif
  const auto e = exponential<T>(x);
  const Vec<T> y = e.power * e.rest + e.power;
  return x < F::low ? Vec<T>{} : y;
}

// The exponentials of a softmax, e^(x - m), from x and base(m): one multiply-add leads to an exponent of 2, which
// leaves a rounding of |x - m| / 2^24 more than exp has, about what x had when it was a sum of products. Float:
// 2^r for |r| <= 1/2 within 9.2e-8. exp_from(-inf, .) = 0.
template <typename T> inline Vec<T> base(Vec<T> m) {
  return std::is_same_v<T, float> ? m * T(1.44269504088896340736) : m;
}
template <typename T> inline Vec<T> exp_from(Vec<T> x, Vec<T> base) {
  if constexpr (!std::is_same_v<T, float>) {
    return exp<T>(x - base);
  } else {
    [[maybe_unused]] constexpr Format<float> format{};
    const Vec<T> t = max<T>(all<T>(-150.0f), x * 1.44269504f - base);
#ifdef __AVX512F__
    const Vec<T> n = (Vec<T>)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT);
#else
    const Vec<T> shifted = t + format.round, n = shifted - format.round;
#endif
    const Vec<T> r = t - n;
    constexpr float terms[] = {1.0f, 6.9314697748e-1f, 2.4022241922e-1f, 5.5507338722e-2f, 9.6715233123e-3f,
                               1.3264713611e-3f};
    Vec<T> y = all<T>(terms[5]);
#pragma GCC unroll 8
    for (int k = 4; k >= 0; --k) y = y * r + terms[k];
#ifdef __AVX512F__
    return (Vec<T>)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
    const Vec<T> scaled = (Vec<T>)((Ints<T>)y + ((Ints<T>)shifted << format.mantissa));
    return t < -126.0f ? Vec<T>{} : t > 127.0f ? all<T>(kInfinity<T>) : scaled;
#endif
  }
}

// tanh x = (1 - e^-2|x|) / (1 + e^-2|x|) with the numerator as expm1, exact to rounding near 0 too.
template <typename T> inline Vec<T> tanh(Vec<T> x) {
  const auto e = exponential<T>(-2 * abs<T>(x));
  const Vec<T> less = e.power * e.rest + (e.power - 1);  // e^-2|x| - 1
  const Vec<T> y = -less / (less + 2);
  return x < 0 ? -y : y;
}

// log x for x > 0 normal: x = 2^n m, sqrt(1/2) <= m < sqrt(2), log m = 2 atanh s with
// s = (m - 1) / (m + 1), |s| < 0.1716; the series in s^2 is cut below 1/4 ulp. log 0 = -inf.
template <typename T> inline Vec<T> log(Vec<T> x) {
  using F = Format<T>;
  const Ints<T> offset = (Ints<T>)x - F::sqrt_half;
  const Ints<T> exponent = offset >> F::mantissa;
  const Ints<T> bits = (Ints<T>)x - (exponent << F::mantissa);
  const Vec<T> m = (Vec<T>)bits;
  const Vec<T> n = __builtin_convertvector(exponent, Vec<T>);
  const Vec<T> s = (m - 1) / (m + 1), square = s * s;
  Vec<T> sum = all<T>(T(1.0 / (2 * F::log_terms + 1)));
#pragma GCC unroll 16
  for (int k = F::log_terms - 1; k >= 1; --k) sum = sum * square + T(1.0 / (2 * k + 1));
  const Vec<T> y = n * F::ln2_high + (2 * s + (2 * s * square * sum + n * F::ln2_low));
  return x > 0 ? y : all<T>(-kInfinity<T>);
}

}  // namespace fastalign::FASTALIGN_ISA
