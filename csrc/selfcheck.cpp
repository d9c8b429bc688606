// A program that runs the kernels without Python, for the sanitizers (`make sanitize`).
//
// Random problems of every kind, awkward sizes, one to four threads and small to ample workspaces. What it
// checks itself is that all results are finite and that no bit depends on the number of threads; reads
// and writes out of place, undefined behaviour and races are for the sanitizers to see.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "align.h"

namespace {

struct Shape {
  int64_t batch, length, heads_s, key_heads_s, size_s, heads_t, key_heads_t, size_t_;
};

template <typename Real> struct Problem {
  std::mt19937 random{7};
  std::vector<Real> q_s, k_s, q_t, k_t, weight, mix, target, sink;
  std::vector<int64_t> positions;
  std::vector<uint8_t> columns;
  std::vector<int32_t> segments, blocks;
  std::vector<Real> lse_s, lse_t, statistics, entries, pool, moments, d_q, d_k, d_mix, thresholds, by;
  FaCall call{};

  std::vector<Real> normal(int64_t size) {
    std::normal_distribution<Real> draw;
    std::vector<Real> out(size);
    for (Real& x : out) x = draw(random);
    return out;
  }

  FaTensor tensor(const std::vector<Real>& x, int64_t heads, int64_t rows, int64_t size) {
    return {x.data(), {heads * rows * size, rows * size, size, 1},
            sizeof(Real) == 8 ? int64_t(kFloat64) : int64_t(kFloat32)};
  }

  Problem(const Shape& s, int64_t heads, int64_t normalize, int64_t divergence, bool pooled, bool sinks,
          bool given, double softcap) {
    const int64_t B = s.batch, L = s.length;
    const int64_t heads_t = heads == kEach ? s.heads_s : s.heads_t;
    const int64_t key_heads_t = heads == kEach ? s.key_heads_s : s.key_heads_t;
    q_s = normal(B * s.heads_s * L * s.size_s);
    k_s = normal(B * s.key_heads_s * L * s.size_s);
    q_t = normal(B * heads_t * L * s.size_t_);
    k_t = normal(B * key_heads_t * L * s.size_t_);
    mix = normal(s.heads_s * heads_t);
    sink = normal(std::max(s.heads_s, heads_t));
    std::bernoulli_distribution mostly(0.8), sometimes(0.4);
    for (int64_t b = 0; b < B; ++b)
      for (int64_t j = 0; j < L; ++j) {
        const bool valid = j < L - b;
        positions.push_back(valid && mostly(random) ? j : -1);
        columns.push_back(valid && sometimes(random));
        segments.push_back(valid ? int32_t(j > L / 2) : -1);
        blocks.push_back(columns.back() ? 0 : -1);
        weight.push_back(positions.back() < 0 ? Real(0) : Real(1));
      }
    call.groups = heads == kMean ? 1 : heads == kEach ? s.heads_s : heads_t;
    const int64_t G = call.groups, count = divergence == kCosine ? 3 : 1;
    lse_s.resize(B * s.heads_s * L);
    lse_t.resize(B * heads_t * L);
    statistics.resize(count * B * G * L);
    entries.resize(B * L);
    pool.resize(5 * B * G * L);
    moments.resize(4 * B * G * L);
    d_q.resize(q_s.size());
    d_k.resize(k_s.size());
    d_mix.resize(mix.size());
    thresholds.assign(2 * B * G, Real(0.5));
    by.assign(count * B * G * L, Real(0.25));
    call.student = {tensor(q_s, s.heads_s, L, s.size_s), tensor(k_s, s.key_heads_s, L, s.size_s),
                    s.heads_s, s.key_heads_s, s.size_s, 0.3, softcap, nullptr,
                    softcap != 0 ? sink.data() : nullptr, lse_s.data()};
    if (!given)
      call.teacher = {tensor(q_t, heads_t, L, s.size_t_), tensor(k_t, key_heads_t, L, s.size_t_),
                      heads_t, key_heads_t, s.size_t_, 0.3, softcap, nullptr, nullptr, lse_t.data()};
    if (given && !pooled) {
      target = normal(B * G * L * L);
      for (Real& x : target) x = std::abs(x);
      call.target = target.data();
      call.target_rows = call.target_width = L;
    }
    call.batch = B;
    call.length = call.rows = L;
    call.positions = positions.data();
    call.columns = columns.data();
    call.segments = segments.data();
    call.blocks = softcap != 0 ? blocks.data() : nullptr;
    call.weight = weight.data();
    call.mix = heads == kMix ? mix.data() : nullptr;
    call.temperature = 1.5;
    call.window = softcap != 0 ? L / 2 + 1 : 0;
    call.causal = 1;
    call.wide = sizeof(Real) == 8;
    call.heads = heads;
    call.normalize = normalize;
    call.divergence = divergence;
    call.pooled = pooled;
    call.in_logs = normalize == kVisual || (divergence != kCosine && divergence != kMse);
    call.sink_filter = sinks;
    call.wanted = kWantQ | kWantK | (heads == kMix ? int64_t(kWantMix) : 0);
    call.statistics = statistics.data();
    call.entries = entries.data();
    call.pool = pool.data();
    call.moments = moments.data();
    call.d_q = d_q.data();
    call.d_k = d_k.data();
    call.d_mix = d_mix.data();
  }

  bool run(int64_t threads, int64_t budget, std::vector<Real>& out) {
    for (auto* x : {&statistics, &pool, &d_q, &d_k, &d_mix}) std::fill(x->begin(), x->end(), Real(0));
    call.threads = threads;
    call.budget = budget;
    void* session = nullptr;
    int64_t chunks = 0;
    if (fa_open(&call, &session, &chunks)) return false;
    const void* filter = call.sink_filter ? thresholds.data() : nullptr;
    std::vector<Real> pooled(call.batch * call.groups * call.length, Real(0.1));
    FaCoefficients c{by.data(), nullptr, nullptr};
    if (call.pooled) c = {nullptr, pooled.data(), pooled.data()};
    int64_t failed = 0;
    for (int64_t i = 0; i < chunks; ++i) {
      failed |= fa_maps(session, i);
      failed |= call.pooled ? fa_pool(session, i, filter) : fa_statistics(session, i, filter);
    }
    for (int64_t i = chunks - 1; i >= 0; --i) failed |= fa_gradients(session, i, filter, &c);
    fa_close(session);
    out.clear();
    for (auto* x : {&statistics, &pool, &d_q, &d_k, &d_mix}) out.insert(out.end(), x->begin(), x->end());
    for (const Real x : out)
      if (!std::isfinite(x)) return false;
    return !failed;
  }
};

template <typename Real> int check(const Shape& shape) {
  int runs = 0;
  for (int64_t heads : {kMean, kEach, kMix})
    for (int64_t normalize : {kJoint, kVisual, kVisualPerHead, kScores})
      for (int64_t divergence : {kCosine, kKl, kReverseKl, kJs, kMse})
        for (int variant = 0; variant < 8; ++variant) {
          const bool pooled = variant & 1, sinks = variant & 2, given = variant & 4;
          const bool logs = divergence != kCosine && divergence != kMse;
          if ((normalize == kScores && (logs || sinks)) || (heads == kMix && (logs || normalize == kVisual)))
            continue;
          if ((given && sinks && pooled) || (given && heads == kMix)) continue;
          Problem<Real> problem(shape, heads, normalize, divergence, pooled, sinks, given,
                                variant & 1 ? 4.0 : 0.0);
          for (int64_t budget : {int64_t(1) << 26, int64_t(20000), int64_t(1000)}) {
            std::vector<Real> one, other;
            for (int64_t threads : {1, 2, 4}) {
              ++runs;
              const bool fine = problem.run(threads, budget, threads == 1 ? one : other);
              if (fine && (threads == 1 ||
                           !std::memcmp(one.data(), other.data(), one.size() * sizeof(Real))))
                continue;
              std::printf("heads %d normalize %d divergence %d variant %d budget %d threads %d: %s\n",
                          int(heads), int(normalize), int(divergence), variant, int(budget), int(threads),
                          fine ? "other bits than with one thread" : "not finite, or failed");
              std::exit(1);
            }
          }
        }
  return runs;
}

}  // namespace

int main() {
  int runs = 0;
  for (const Shape& shape : {Shape{2, 29, 4, 2, 9, 6, 3, 16}, Shape{1, 61, 3, 1, 16, 2, 2, 5}})
    runs += check<float>(shape) + check<double>(shape);
  std::printf("%d runs (%s): finite, and the same bits for 1, 2 and 4 threads\n", runs, fa_isa());
}
