// Entry by entry: what a map contributes to its divergence, and the gradient by an entry.
//
// maths.row_statistics and gradients.entry_gradient, for one vector of lanes. `s` and `t` are the maps,
// or their logarithms when `Logs` (then the maps are exp of them). Nothing here knows of heads or keys.
#pragma once

#include "align.h"
#include "vec.h"

namespace fastalign::FASTALIGN_ISA {

template <typename T> constexpr T kLn2 = T(0.693147180559945309417);

// log((e^s + e^t) / 2) = max + log1p(exp(-|s - t|)) - log 2
template <typename T> inline Vec<T> log_middle(Vec<T> s, Vec<T> t) {
  return max<T>(s, t) + log<T>(exp<T>(-abs<T>(s - t)) + 1) - kLn2<T>;
}

// Calls f(d, in_logs) with both as types, so that an inner loop holds no branch.
template <int N> struct Constant { static constexpr int value = N; };
template <typename F> inline void for_divergence(int64_t divergence, int64_t in_logs, F f) {
  switch (divergence) {
    case kKl: return f(Constant<kKl>(), Constant<1>());
    case kReverseKl: return f(Constant<kReverseKl>(), Constant<1>());
    case kJs: return f(Constant<kJs>(), Constant<1>());
    case kMse:
      return in_logs ? f(Constant<kMse>(), Constant<1>()) : f(Constant<kMse>(), Constant<0>());
    default:
      return in_logs ? f(Constant<kCosine>(), Constant<1>()) : f(Constant<kCosine>(), Constant<0>());
  }
}

template <typename T, bool kLogs> inline Vec<T> plain(Vec<T> x) {
  if constexpr (kLogs) return exp<T>(x); else return x;
}

constexpr int statistic_count(int64_t divergence) { return divergence == kCosine ? 3 : 1; }

// Adds one vector of entries to its row's statistics.
template <typename T, int kDivergence, bool kLogs>
inline void add_statistics(Vec<T> s, Vec<T> t, Vec<T> keep, Vec<T>* sum) {
  const Vec<T> a = plain<T, kLogs>(s), b = plain<T, kLogs>(t);
  auto add = [&](int n, Vec<T> term) { sum[n] += keep != 0 ? term : Vec<T>{}; };
  if constexpr (kDivergence == kCosine) {
    add(0, a * b);
    add(1, a * a);
    add(2, b * b);
  } else if constexpr (kDivergence == kKl) {
    add(0, b * (t - s));
  } else if constexpr (kDivergence == kReverseKl) {
    add(0, a * (s - t));
  } else if constexpr (kDivergence == kJs) {
    const Vec<T> m = log_middle<T>(s, t);
    add(0, T(0.5) * (b * (t - m) + a * (s - m)));
  } else {
    add(0, (a - b) * (a - b));
  }
}

// dL/dA_s, or dL/d log A_s for logarithms, of one vector; c[n] are the rows' coefficients.
template <typename T, int kDivergence, bool kLogs>
inline Vec<T> entry_gradient(Vec<T> s, Vec<T> t, Vec<T> keep, const Vec<T>* c) {
  const Vec<T> a = plain<T, kLogs>(s), b = plain<T, kLogs>(t);
  Vec<T> g;
  if constexpr (kDivergence == kKl) {
    g = -c[0] * b;
  } else if constexpr (kDivergence == kReverseKl) {
    g = c[0] * a * (s - t + 1);
  } else if constexpr (kDivergence == kJs) {
    g = c[0] * T(0.5) * a * (s - log_middle<T>(s, t));
  } else {
    if constexpr (kDivergence == kCosine) g = c[0] * b + 2 * c[1] * a;
    else g = 2 * c[0] * (a - b);
    if constexpr (kLogs) g *= a;
  }
  return keep != 0 ? g : Vec<T>{};
}

}  // namespace fastalign::FASTALIGN_ISA
