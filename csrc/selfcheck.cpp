// A program that runs the kernels without Python, for the sanitizers (`make sanitize`).
//
// Every objective (heads, normalisation, divergence, comparison, sink filter, kind of target) in several
// draws of everything else: types and strides of q and k, sizes, heads that share keys, padding, packed
// segments, blocks, windows, softcap, sinks, weights, workspaces, subsets of the gradients. Every array has
// exactly the size that the call names, and every buffer of the kernels starts as NaN. What the program
// checks itself: all results are finite, no bit depends on the number of threads, the workspace's size and
// a log-sum-exp handed back in change nothing but rounding. Reads and writes out of place, undefined
// behaviour and races are for the sanitizers to see; right and wrong numbers are the tests' part.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "align.h"

namespace {

// The same draws with every compiler, which the standard's distributions do not promise.
struct Random {
  std::mt19937_64 engine;
  int64_t below(int64_t n) { return static_cast<int64_t>(engine() % static_cast<uint64_t>(n)); }
  bool chance(int percent) { return below(100) < percent; }
  double uniform(double low, double high) {
    return low + (high - low) * (static_cast<double>(engine() >> 11) * 0x1p-53);
  }
};

// How often each feature was drawn: a path that no run takes must not pass for a checked one.
std::map<std::string, int> drawn;
bool note(const char* feature, bool on) {
  drawn[feature] += on;
  return on;
}

// What an AlignSpec says, and the kind of target.
struct Objective {
  int64_t heads, normalize, divergence;
  bool pooled, filter;
  enum { kTeacher, kDense, kSparse } target;

  bool logs() const { return divergence != kCosine && divergence != kMse; }
  bool allowed() const {
    if (normalize == kScores && (logs() || filter)) return false;
    if (heads == kMix && (logs() || normalize == kVisual)) return false;
    return !(target != kTeacher && pooled && filter);
  }
};

// q or k [B, heads, rows, size]: one of four types, one of four layouts, not a byte more than they take.
struct Array {
  std::vector<unsigned char> bytes;
  FaTensor tensor{};

  Array() = default;
  Array(Random& random, int64_t dtype, int64_t batch, int64_t heads, int64_t rows, int64_t size) {
    const int64_t layout = random.below(4);
    note("layout [B, L, H, D]", layout == 1);
    note("layout with gaps", layout == 2);
    note("one head for all", layout == 3);
    const int64_t gap = layout == 2 ? 2 : 1;
    int64_t stride[4] = {heads * rows * size * gap, rows * size * gap, size * gap, gap};
    if (layout == 1) stride[1] = size, stride[2] = heads * size;
    if (layout == 3) stride[0] = rows * size, stride[1] = 0;
    const int64_t n[4] = {batch, heads, rows, size};
    int64_t count = 1;
    for (int i = 0; i < 4; ++i) count += (n[i] - 1) * stride[i];
    if (batch * heads * rows * size == 0) count = 0;
    const int64_t width = dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
    bytes.resize(static_cast<size_t>(count * width));
    for (int64_t i = 0; i < count; ++i) put(random, dtype, bytes.data() + i * width);
    tensor.data = bytes.data();
    std::copy(stride, stride + 4, tensor.stride);
    tensor.dtype = dtype;
  }

  static void put(Random& random, int64_t dtype, unsigned char* at) {
    auto write = [&](auto value) { std::memcpy(at, &value, sizeof value); };
    const double x = random.uniform(-1.7, 1.7);
    const auto narrow = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof bits);
    if (dtype == kFloat64) write(x);
    else if (dtype == kFloat32) write(narrow);
    else if (dtype == kBFloat16) write(static_cast<uint16_t>(bits >> 16));
    else  // sign, exponents 2^-4 to 2^0 and now and then a subnormal, any mantissa
      write(static_cast<uint16_t>(random.below(2) << 15 | random.below(1024) |
                                  (random.chance(3) ? 0 : 11 + random.below(5)) << 10));
  }
};

template <typename Real> class Problem {
 public:
  Problem(const Objective& objective, uint64_t seed) : objective_(objective), random_{} {
    random_.engine.seed(seed);
    sizes();
    tokens();
    models();
    targets();
    results();
  }

  // Everything that one choice of threads and workspace gives, or nothing if a call fails.
  std::vector<Real> run(int64_t threads, int64_t budget) {
    for (auto* x : {&lse_s_, &lse_t_, &statistics_, &entries_, &pool_, &moments_, &d_mix_, &delta_})
      std::fill(x->begin(), x->end(), Real(0));
    for (auto* x : {&d_q_, &d_k_})  // written everywhere, also where nothing is compared
      std::fill(x->begin(), x->end(), std::numeric_limits<Real>::quiet_NaN());
    call.threads = threads;
    call.budget = budget;
    void* session = nullptr;
    int64_t chunks = 0;
    if (fa_open(&call, &session, &chunks)) return {};
    const bool done = phases(session, chunks);
    fa_close(session);
    std::vector<Real> out;
    for (auto* x : {&statistics_, &entries_, &pool_, &moments_, &d_q_, &d_k_, &d_mix_, &delta_})
      out.insert(out.end(), x->begin(), x->end());
    out.push_back(Real(0));  // an empty result is a failure
    return done ? out : std::vector<Real>();
  }

  // The log-sum-exps of the last run become inputs; whether they may (fastalign/validate.py).
  bool hand_back() {
    if (objective_.normalize != kJoint && objective_.normalize != kVisual) return false;
    if (call.temperature != 1) return false;
    given_s_ = lse_s_;
    call.student.given_lse = given_s_.data();
    if (call.teacher.heads && random_.chance(60)) {
      given_t_ = lse_t_;
      call.teacher.given_lse = given_t_.data();
    }
    return note("given log-sum-exp", true);
  }

  FaCall call{};

 private:
  std::vector<Real> numbers(int64_t count, double low, double high) {
    std::vector<Real> out(static_cast<size_t>(count));
    for (Real& x : out) x = static_cast<Real>(random_.uniform(low, high));
    return out;
  }

  void sizes() {
    const int64_t lengths[] = {1, 7, 33, 49, 63, 111, 145};
    call.batch = random_.below(3) + 1;
    call.length = lengths[random_.below(7)];
    note("length 1", call.length == 1);
    note("length above 100", call.length > 100);
    call.rows = note("rows of their own", random_.chance(40)) ? random_.below(call.length) + 1 : call.length;
    call.heads = objective_.heads;
    call.normalize = objective_.normalize;
    call.divergence = objective_.divergence;
    call.pooled = objective_.pooled;
    call.sink_filter = objective_.filter;
    call.in_logs = objective_.logs() || objective_.normalize == kVisual;
    call.wide = sizeof(Real) == 8;
    call.causal = note("causal", random_.chance(70));
    call.temperature = note("temperature", random_.chance(30)) ? 1.5 : 1.0;
    call.window = note("window", random_.chance(30)) ? random_.below(call.length) + 1 : 0;
    call.local = !objective_.pooled && note("local gradient", random_.chance(50));
  }

  // Padding, segments, blocks, columns, rows and their weights.
  void tokens() {
    const int64_t batch = call.batch, length = call.length;
    const bool packed = note("packed segments", random_.chance(30));
    const bool blocks = note("blocks", random_.chance(40));
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t pad = random_.chance(40) ? random_.below(length) : 0;
      const bool left = note("padding on the left", pad && random_.chance(50));
      note("padding on the right", pad && !left);
      const bool blind = note("a sample without columns", random_.chance(10));
      const int64_t share = random_.chance(20) ? 100 : random_.below(100);
      std::vector<int64_t> places;
      for (int64_t j = 0; j < length; ++j) {
        const bool valid = left ? j >= pad : j < length - pad;
        segments_.push_back(valid ? int32_t(packed && j > length / 2) : -1);
        blocks_.push_back(valid ? int32_t(random_.below(3)) - 1 : -1);
        columns_.push_back(valid && !blind && random_.chance(int(share)));
        if (valid) places.push_back(j);
      }
      for (size_t i = places.size(); i > 1; --i)
        std::swap(places[i - 1], places[static_cast<size_t>(random_.below(int64_t(i)))]);
      if (call.rows == length) std::sort(places.begin(), places.end());
      places.resize(static_cast<size_t>(call.rows), -1);
      for (int64_t& place : places)
        if (random_.chance(20)) place = -1;
      positions_.insert(positions_.end(), places.begin(), places.end());
    }
    weight_ = numbers(batch * call.rows, 0, 2);
    const bool weighted = note("row weights", random_.chance(50));
    for (size_t i = 0; i < weight_.size(); ++i) {
      if (positions_[i] < 0) weight_[i] = 0;
      else if (!weighted) weight_[i] = 1;
      else if (random_.chance(20)) weight_[i] = 0;
    }
    call.positions = positions_.data();
    call.columns = columns_.data();
    call.segments = segments_.data();
    call.blocks = blocks ? blocks_.data() : nullptr;
    call.weight = weight_.data();
  }

  FaSide side(Array& q, Array& k, std::vector<Real>& sink, std::vector<Real>& lse, int64_t heads) {
    FaSide out{};
    int64_t shared = random_.below(heads) + 1;
    while (heads % shared) --shared;
    note("heads that share keys", shared < heads);
    out.heads = heads;
    out.key_heads = shared;
    out.size = random_.below(3) ? random_.below(40) + 1 : 16 << random_.below(3);
    q = Array(random_, dtype(), call.batch, heads, call.rows, out.size);
    k = Array(random_, dtype(), call.batch, shared, call.length, out.size);
    out.q = q.tensor;
    out.k = k.tensor;
    out.scale = note("scores to 1e4", random_.chance(10)) ? 1e3 : 1 / std::sqrt(double(out.size));
    out.softcap = note("softcap", random_.chance(30)) ? 5.0 : 0.0;
    sink = numbers(heads, -2, 2);
    if (call.normalize != kScores && note("sinks", random_.chance(30))) out.sink = sink.data();
    lse.resize(static_cast<size_t>(call.batch * heads * call.rows));
    out.lse = lse.data();
    return out;
  }

  int64_t dtype() {
    const char* names[] = {"float32", "float64", "float16", "bfloat16"};
    int64_t type = random_.below(4);
    if (!call.wide && type == kFloat64) type = kFloat32;
    note(names[type], true);
    return type;
  }

  void models() {
    const int64_t heads = random_.below(6) + 1;
    const int64_t other = objective_.heads == kEach ? heads : random_.below(6) + 1;
    call.groups = objective_.heads == kMean ? 1 : objective_.heads == kEach ? heads : other;
    call.student = side(q_s_, k_s_, sink_s_, lse_s_, heads);
    if (objective_.target == Objective::kTeacher)
      call.teacher = side(q_t_, k_t_, sink_t_, lse_t_, other);
    if (objective_.heads == kMix) {
      mix_ = numbers(heads * call.groups, -1, 1);
      call.mix = mix_.data();
    }
  }

  void targets() {
    if (objective_.target == Objective::kTeacher || objective_.pooled) return;
    for (int64_t b = 0; b < call.batch; ++b) {
      const auto* at = positions_.data() + b * call.rows;
      call.target_rows = std::max<int64_t>(
          call.target_rows, std::count_if(at, at + call.rows, [](int64_t p) { return p >= 0; }));
      const auto* c = columns_.data() + b * call.length;
      call.target_width = std::max<int64_t>(call.target_width, std::count(c, c + call.length, 1));
    }
    const int64_t columns = call.target_width;
    const bool sparse = objective_.target == Objective::kSparse;
    if (sparse) call.target_width = 3;
    const int64_t count = call.batch * call.groups * call.target_rows * call.target_width;
    target_ = numbers(count, 0, 1);
    for (Real& x : target_)
      if (random_.chance(20)) x = 0;
    for (int64_t i = 0; sparse && i < count; ++i) target_index_.push_back(random_.below(columns + 1) - 1);
    call.target = target_.data();
    if (sparse) call.target_index = target_index_.data();
  }

  // Only what the call says will be written; a gradient that is not asked for has no memory at all.
  void results() {
    const int64_t batch = call.batch, maps = batch * call.groups;
    const FaSide& s = call.student;
    const int64_t kinds[] = {0, kWantQ, kWantK, kWantQ | kWantK};
    call.wanted = random_.chance(60) ? int64_t(kWantQ | kWantK) : kinds[random_.below(4)];
    if (call.mix && random_.chance(80)) call.wanted |= kWantMix;
    if (s.sink && random_.chance(60)) call.wanted |= kWantSink;
    note("no gradient", !call.wanted);
    note("dq alone", call.wanted == kWantQ);
    note("dk alone", call.wanted == kWantK);
    note("dmix", call.wanted & kWantMix);
    note("sinks' gradient", call.wanted & kWantSink);
    auto room = [](std::vector<Real>& x, int64_t count) {
      x.resize(static_cast<size_t>(count));
      return count ? static_cast<void*>(x.data()) : nullptr;
    };
    const int64_t count = call.divergence == kCosine ? 3 : 1;
    call.statistics = room(statistics_, count * maps * (call.pooled ? 1 : call.rows));
    call.entries = room(entries_, batch * call.rows);
    call.pool = room(pool_, call.pooled ? 5 * maps * call.length : 0);
    call.moments = room(moments_, call.sink_filter ? 4 * maps * call.rows : 0);
    call.d_q = room(d_q_, call.wanted & kWantQ ? batch * s.heads * call.rows * s.size : 0);
    call.d_k = room(d_k_, call.wanted & kWantK ? batch * s.key_heads * call.length * s.size : 0);
    call.d_mix = room(d_mix_, call.wanted & kWantMix ? s.heads * call.groups : 0);
    call.delta = room(delta_, call.wanted & kWantSink ? batch * s.heads * call.rows : 0);
    by_ = numbers(count * maps * call.rows, -1, 1);
    by_pooled_ = numbers(maps * call.length, -1, 1);
  }

  // The order of fastalign/backends/cpu.py: align.
  bool phases(void* session, int64_t chunks) {
    int64_t failed = 0;
    std::vector<Real> thresholds, logs;
    const void* filter = nullptr;
    if (call.sink_filter) {
      for (int64_t i = 0; i < chunks; ++i) failed |= fa_maps(session, i);
      thresholds = from_moments();
      filter = thresholds.data();
    }
    const bool follow = call.wanted && call.local && chunks > 1;
    FaCoefficients c{by_.data(), nullptr, nullptr};
    for (int64_t i = 0; i < chunks; ++i) {
      failed |= fa_maps(session, i);
      if (call.pooled) failed |= fa_pool(session, i, filter);
      else if (filter) failed |= fa_statistics(session, i, filter);
      if (follow) failed |= fa_gradients(session, i, filter, &c);
    }
    note("gradients chunk by chunk", follow);
    note("several chunks", chunks > 1);
    if (call.pooled) {
      logs = pooled_logs();
      c = {nullptr, by_pooled_.data(), logs.data()};
    }
    if (call.wanted && !follow)
      for (int64_t i = chunks - 1; i >= 0; --i) failed |= fa_gradients(session, i, filter, &c);
    return !failed;
  }

  // One and a half times the mean entry of each map: cuts some entries, not all.
  std::vector<Real> from_moments() const {
    const int64_t maps = call.batch * call.groups;
    std::vector<Real> out(static_cast<size_t>(2 * maps));
    for (int64_t side = 0; side < 2; ++side)
      for (int64_t map = 0; map < maps; ++map) {
        const Real* total = moments_.data() + (2 * side * maps + map) * call.rows;
        for (int64_t r = 0; r < call.rows; ++r)
          out[side * maps + map] += total[r] * Real(1.5) / Real(call.rows * call.length);
      }
    return out;
  }

  std::vector<Real> pooled_logs() const {
    const int64_t size = call.batch * call.groups * call.length;
    std::vector<Real> out(static_cast<size_t>(size));
    for (int64_t i = 0; i < size; ++i) {
      const Real count = pool_[4 * size + i];
      out[i] = count > 0 ? pool_[2 * size + i] - std::log(count) : Real(0);
    }
    return out;
  }

  Objective objective_;
  Random random_;
  Array q_s_, k_s_, q_t_, k_t_;
  std::vector<Real> weight_, mix_, target_, sink_s_, sink_t_, given_s_, given_t_, by_, by_pooled_;
  std::vector<int64_t> positions_, target_index_;
  std::vector<uint8_t> columns_;
  std::vector<int32_t> segments_, blocks_;
  std::vector<Real> lse_s_, lse_t_, statistics_, entries_, pool_, moments_, d_q_, d_k_, d_mix_, delta_;
};

template <typename Real> bool finite(const std::vector<Real>& x) {
  return !x.empty() && std::all_of(x.begin(), x.end(), [](Real v) { return std::isfinite(v); });
}

// Largest difference over the largest entry: two orders of summation of the same numbers.
template <typename Real> bool close(const std::vector<Real>& a, const std::vector<Real>& b) {
  Real most = 1, apart = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    most = std::max(most, std::abs(b[i]));
    apart = std::max(apart, std::abs(a[i] - b[i]));
  }
  return apart <= most * (sizeof(Real) == 8 ? Real(1e-9) : Real(1e-3));
}

template <typename Real> int check(const Objective& o, uint64_t seed) {
  int runs = 0;
  Problem<Real> problem(o, seed);
  auto fail = [&](const char* what, int64_t budget, int64_t threads) {
    std::printf("%s, heads %d normalize %d divergence %d pooled %d filter %d target %d, seed %d, "
                "workspace %d, %d threads: %s (%s)\n",
                sizeof(Real) == 8 ? "double" : "float", int(o.heads), int(o.normalize), int(o.divergence),
                o.pooled, o.filter, int(o.target), int(seed), int(budget), int(threads), what, fa_error());
    std::exit(1);
  };
  std::vector<Real> ample;
  for (const int64_t budget : {int64_t(1) << 26, int64_t(40000), int64_t(1000)}) {
    std::vector<Real> one;
    for (const int64_t threads : {1, 2, 3, 4}) {
      if (threads == 2 && budget != 40000) continue;
      const std::vector<Real> got = problem.run(threads, budget);
      ++runs;
      if (!finite(got)) fail("not finite, or failed", budget, threads);
      if (threads == 1) one = got;
      if (std::memcmp(one.data(), got.data(), one.size() * sizeof(Real)))
        fail("other bits than with one thread", budget, threads);
    }
    if (ample.empty()) ample = one;
    // an entry may lie on the other side of a threshold by one rounding
    if (!o.filter && !close(one, ample)) fail("other results than with ample workspace", budget, 1);
  }
  if (problem.hand_back()) {
    const std::vector<Real> got = problem.run(2, int64_t(1) << 26);
    ++runs;
    if (!finite(got)) fail("given log-sum-exp: not finite, or failed", 0, 2);
    if (!o.filter && !close(got, ample)) fail("given log-sum-exp: other results", 0, 2);
  }
  return runs;
}

}  // namespace

// selfcheck [DRAWS]: how many problems for each objective and real type.
int main(int count, char** arguments) {
  const int draws = count > 1 ? std::atoi(arguments[1]) : 3;
  fa_poison(1);
  int runs = 0, objectives = 0;
  for (const int64_t heads : {kMean, kEach, kMix})
    for (const int64_t normalize : {kJoint, kVisual, kVisualPerHead, kScores})
      for (const int64_t divergence : {kCosine, kKl, kReverseKl, kJs, kMse})
        for (const bool pooled : {false, true})
          for (const bool filter : {false, true})
            for (const auto target : {Objective::kTeacher, Objective::kDense, Objective::kSparse}) {
              const Objective o{heads, normalize, divergence, pooled, filter, target};
              if (!o.allowed()) continue;
              ++objectives;
              for (int draw = 0; draw < draws; ++draw) {
                const uint64_t seed = static_cast<uint64_t>(objectives * 1000 + draw);
                runs += check<float>(o, seed) + check<double>(o, seed);
              }
            }
  int missing = 0;
  for (const auto& [feature, times] : drawn)
    if (!times) std::printf("never drawn: %s\n", feature.c_str()), ++missing;
  std::printf("%d objectives, %d runs (%s), %d features: finite, and the same bits for 1 to 4 threads\n",
              objectives, runs, fa_isa(), static_cast<int>(drawn.size()));
  return missing != 0;
}
