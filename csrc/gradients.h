// From coefficients to dq, dk and dmix.
//
// With E the gradient by a map's entry (or by its logarithm) and w the head's weight in the map,
//
//     X = P w E   or   X = exp(log P - log A) w E;   dS = X - P sum_V X;
//     dq = scale dS k;   dk = scale dS^T q
//
// for every visible key: those outside V get the second term alone. dS replaces P in the slab; dk then is a
// product over all rows of a pass, a range of keys at a time, so that every element of it has one owner.
#pragma once

#include "engine.h"

namespace fastalign::FASTALIGN_ISA {

template <typename T>
void Engine<T>::gradients(int64_t index, const void* thresholds, const FaCoefficients& c) {
  maps(index);
  thresholds_ = static_cast<const T*>(thresholds);
  resident_ = -1;  // E is about to replace the teacher's maps
  const int64_t groups = chunk_.groups.size();
  parallel(chunk_.blocks.size() * groups, call_.threads,
           [&](int64_t i) { return blocks_[chunk_.blocks.begin + i / groups].columns.size(); },
           [&](int64_t i, int64_t) { map_gradient(chunk_.blocks.begin + i / groups, i % groups, c); });
  thresholds_ = nullptr;

  const FaSide& s = call_.student;
  const int64_t stride = packed_stride<T>(s.size), repeat = s.heads / s.key_heads;
  if (call_.wanted & kWantMix) {
    const int64_t parts = chunk_.blocks.size() * s.heads * groups;
    mix_parts_.reset(parts);
    std::fill_n(mix_parts_.get(), parts, T(0));
  }
  for (Scratch& scratch : scratch_) {
    scratch.d_q.reset(3 * W * s.size);
    scratch.d_k.reset(kStep * stride);
  }
  for (int64_t p = static_cast<int64_t>(passes_.size()) - 1; p >= 0; --p) {
    const Pass& pass = passes_[p];
    const bool resident = p + 1 == static_cast<int64_t>(passes_.size());
    const int64_t heads = pass.heads.size(), blocks = pass.blocks.size();
    query_rows_.reset((lane_at_[pass.blocks.end] - lane_at_[pass.blocks.begin]) * heads * stride);
    parallel(blocks * heads, call_.threads,
             [&](int64_t i) { return blocks_[pass.blocks.begin + i % blocks].tile(); },
             [&](int64_t i, int64_t thread) {
      const int64_t block = pass.blocks.begin + i % blocks, head = pass.heads.begin + i / blocks;
      with_vectors(blocks_[block], [&](auto nv) {
        head_gradient<decltype(nv)::value>(pass, resident, block, head, scratch_[thread]);
      });
    });
    if (!(call_.wanted & kWantK)) continue;

    struct Item { int64_t sample, key_head; Range keys; };
    std::vector<Item> items;
    const int64_t low = blocks_[pass.blocks.begin].sample;
    const int64_t high = blocks_[pass.blocks.end - 1].sample;
    for (int64_t sample = low; sample <= high; ++sample)
      for (int64_t kv = pass.heads.begin / repeat; kv <= (pass.heads.end - 1) / repeat; ++kv)
        for (int64_t k = 0; k < samples_[sample].all[0].end; k += kStep)
          items.push_back({sample, kv, {k, std::min(samples_[sample].all[0].end, k + kStep)}});
    for (Scratch& scratch : scratch_) scratch.stretches.reserve(kStep / kGranule * blocks * repeat);
    parallel(static_cast<int64_t>(items.size()), call_.threads, [](int64_t) { return 1; },
             [&](int64_t i, int64_t thread) {
      key_gradient(pass, items[i].sample, items[i].key_head, items[i].keys, scratch_[thread]);
    });
  }
  if (call_.wanted & kWantMix) {
    T* out = static_cast<T*>(call_.d_mix);
    for (int64_t block = 0; block < chunk_.blocks.size(); ++block)
      for (int64_t h = 0; h < s.heads; ++h)
        for (int64_t g = 0; g < groups; ++g)
          out[h * call_.groups + chunk_.groups.begin + g] +=
              mix_parts_.get()[(block * s.heads + h) * groups + g];
  }
}

// E of one block and group, in the place of the teacher's map.
template <typename T>
void Engine<T>::map_gradient(int64_t index, int64_t group, const FaCoefficients& c) {
  const Block& block = blocks_[index];
  const Sample& sample = samples_[block.sample];
  const int64_t b = sample.b, g = chunk_.groups.begin + group, lanes = block.lanes;
  const int count = statistic_count(call_.divergence);
  T rows[3][3 * W], weight[3 * W];
  if (c.pooled) gather(static_cast<const T*>(call_.weight) + b * call_.rows, block, T(0), weight);
  else
    for (int n = 0; n < count; ++n)
      gather(static_cast<const T*>(c.rows) + by_row(n * call_.batch + b, g), block, T(0), rows[n]);
  const int64_t at = (b * call_.groups + g) * call_.length;
  for (int v = 0; v < lanes / W; ++v) {
    T *s = plane(0, index, group) + v * W, *t = plane(1, index, group) + v * W;
    Vec<T> total{}, factor[3];
    auto each = [&](auto gradient) {
      for (int64_t from = 0; from < block.columns.size(); from += kPartial) {
        Vec<T> partial{};
        for (int64_t i = from; i < std::min(block.columns.size(), from + kPartial); ++i) {
          const Vec<T> x = load(s + i * lanes), y = load(t + i * lanes);
          const int64_t column = block.columns.begin + i;
          const Vec<T> e = gradient(x, y, keep(block, column, v, x, y, group), column);
          store(t + i * lanes, e);
          partial += e;
        }
        total += partial;
      }
    };
    if (c.pooled) {
      const Vec<T> w = load(weight + v * W);
      each([&](Vec<T> x, Vec<T>, Vec<T> kept, int64_t column) {
        const int64_t place = at + sample.key[sample.key_of_column[column]];
        Vec<T> e = static_cast<const T*>(c.pooled)[place] * w;
        if (call_.in_logs) e *= exp<T>(x - static_cast<const T*>(c.pooled_log)[place]);
        return (kept != 0) & (w > 0) ? e : Vec<T>{};
      });
    } else {
      for (int n = 0; n < count; ++n) factor[n] = load(rows[n] + v * W);
      for_divergence(call_.divergence, call_.in_logs, [&](auto divergence, auto in_logs) {
        each([&](Vec<T> x, Vec<T> y, Vec<T> kept, int64_t) {
          return entry_gradient<T, decltype(divergence)::value, decltype(in_logs)::value != 0>(
              x, y, kept, factor);
        });
      });
    }
    if (call_.normalize == kVisual)  // E <- E - A sum_V E
      for (int64_t i = 0; i < block.columns.size(); ++i)
        store(t + i * lanes, load(t + i * lanes) - exp<T>(load(s + i * lanes)) * total);
  }
}

// dS of one head and block in the slab, its dq, and the queries packed for dk.
template <typename T>
template <int NV>
void Engine<T>::head_gradient(const Pass& pass, bool resident, int64_t index, int64_t head,
                              Scratch& scratch) {
  const FaSide& from = call_.student;
  const Block& block = blocks_[index];
  const Sample& s = samples_[block.sample];
  const int64_t stride = packed_stride<T>(from.size);
  T* x = attention(pass, index, head);
  T* queries = packed_queries(pass, index, head);
  load_queries(from, block, head, queries);
  if (!resident) {
    const bool softmax = call_.normalize != kScores;
    Vec<T> m[NV], sum[NV];
    transpose(queries, stride, block.live, from.size, block.lanes, scratch.transposed.get());
    scores<T, NV>(packed(true, block, head) - block.keys.begin * stride, stride,
                  scratch.transposed.get(), from.size, block, s.all, masks(block), cap(from),
                  softmax ? -kInfinity<T> : T(0), x, m);
    if (keeps_exponentials(from)) {
      T lanes[NV * W];
      gather(static_cast<const T*>(from.lse) + (s.b * from.heads + head) * call_.rows, block, T(0), lanes);
      for (int v = 0; v < NV; ++v) {
        m[v] = load(lanes + v * W);
        store(factor(index, head) + v * W, all<T>(T(1)));
      }
      exponentials<T, NV, true>(block, s.all, m, x, sum);
    }
  }
  softmax_gradient<NV>(index, head, x, scratch);
  if (call_.wanted & kWantQ) query_gradient<NV>(index, head, x, scratch);
}

// P (or S) -> dS in place; dmix on the way.
template <typename T>
template <int NV>
void Engine<T>::softmax_gradient(int64_t index, int64_t head, T* s, Scratch& scratch) {
  constexpr int lanes = NV * W;
  const FaSide& from = call_.student;
  const Block& block = blocks_[index];
  const Sample& sample = samples_[block.sample];
  const int32_t* key = sample.key_of_column.data() + block.columns.begin;
  const int32_t* column = sample.column_of_key.data();
  const int64_t columns = block.columns.size(), groups = chunk_.groups.size();
  const bool each = call_.heads == kEach, exponentials = keeps_exponentials(from);
  const bool softmax = call_.normalize != kScores;
  auto line = [&](int64_t c) { return s + (key[c] - block.keys.begin) * lanes; };
  // The line of a map that belongs to key k; null for keys that are no column in reach of the block.
  auto entries = [&](const T* map, int64_t k) {
    const int64_t c = column[k] - block.columns.begin;
    return column[k] >= 0 && c >= 0 && c < columns ? map + c * lanes : nullptr;
  };

  Vec<T> f[NV] = {}, lse[NV] = {}, delta[NV] = {};
  if (softmax) {
    T values[lanes];
    gather(static_cast<const T*>(from.lse) + (sample.b * from.heads + head) * call_.rows, block, T(0),
           values);
    for (int v = 0; v < NV; ++v) {
      lse[v] = load(values + v * W);
      if (exponentials) f[v] = load(factor(index, head) + v * W);
    }
  }
  auto probability = [&](Vec<T> x, int v) {
    return !softmax ? x : exponentials ? x * f[v] : exp<T>(x - lse[v]);
  };

  const T* gradient = plane(1, index, each ? head - chunk_.groups.begin : 0);
  T weight = call_.heads == kMean ? T(1) / T(from.heads) : T(1);
  if (call_.heads == kMix) {  // w E summed over the groups, and dmix = sum P E
    T* mixed = scratch.column.get();
    const T* mix = static_cast<const T*>(call_.mix) + head * call_.groups + chunk_.groups.begin;
    T* part = mix_parts_.get() +
              ((index - chunk_.blocks.begin) * from.heads + head) * groups;
    for (int64_t g = 0; g < groups; ++g) {
      const T* e = plane(1, index, g);
      Vec<T> sum{};
      for (int64_t c = 0; c < columns; ++c)
        for (int v = 0; v < NV; ++v) {
          T* out = mixed + c * lanes + v * W;
          const Vec<T> x = load(e + c * lanes + v * W);
          store(out, g == 0 ? x * mix[g] : load(out) + x * mix[g]);
          if (call_.wanted & kWantMix) sum += probability(load(line(c) + v * W), v) * x;
        }
      if (call_.wanted & kWantMix) {
        part[g] = 0;
        for (int i = 0; i < W; ++i) part[g] += sum[i];
      }
    }
    gradient = mixed;
  }

  if (exponentials) {  // the hot case: X = e f w E, dS = e f (w E - delta)
    for (int64_t c0 = 0; c0 < columns; c0 += kPartial) {
      Vec<T> partial[NV] = {};
      for (int64_t c = c0; c < std::min(columns, c0 + kPartial); ++c)
        for (int v = 0; v < NV; ++v)
          partial[v] += load(line(c) + v * W) * load(gradient + c * lanes + v * W);
      for (int v = 0; v < NV; ++v) delta[v] += partial[v];
    }
    Vec<T> scale[NV];
    for (int v = 0; v < NV; ++v) scale[v] = f[v] * weight, delta[v] *= f[v] * scale[v];
    for (int64_t k = block.keys.begin; k < block.keys.end; ++k, s += lanes) {
      const T* e = entries(gradient, k);
      for (int v = 0; v < NV; ++v) {
        Vec<T> slope = -delta[v];
        if (e) slope += load(e + v * W) * scale[v];
        store(s + v * W, load(s + v * W) * slope);
      }
    }
    return;
  }

  // In general: X into scratch, then dS = (X - P delta) slope of the soft cap / temperature.
  T* x = scratch.column.get();
  const T* log_a = plane(0, index, 0);
  for (int64_t c = 0; c < columns; ++c)
    for (int v = 0; v < NV; ++v) {
      const Vec<T> e = load(gradient + c * lanes + v * W) * weight, value = load(line(c) + v * W);
      Vec<T> share = probability(value, v);
      if (!softmax || (call_.in_logs && each)) share = all<T>(T(1));
      else if (call_.in_logs) {
        const Vec<T> mass = call_.normalize == kVisual ? load(this->mass(index, 0) + v * W) : Vec<T>{};
        share = exp<T>(value - lse[v] - load(log_a + c * lanes + v * W) - mass);
      }
      const Vec<T> term = e != 0 ? share * e : Vec<T>{};
      store(x + c * lanes + v * W, term);
      if (softmax) delta[v] += term;
    }
  const T inside = from.softcap ? T(call_.temperature / from.softcap) : T(0);
  const T outside = from.softcap ? T(1 / call_.temperature) : T(1);
  for (int64_t k = block.keys.begin; k < block.keys.end; ++k, s += lanes) {
    const T* term = entries(x, k);
    for (int v = 0; v < NV; ++v) {
      const Vec<T> value = load(s + v * W);
      Vec<T> ds{};
      if (softmax) ds = -exp<T>(value - lse[v]) * delta[v];
      if (term) ds += load(term + v * W);
      if (inside != 0) ds *= outside * (1 - min<T>((value * inside) * (value * inside), all<T>(T(1))));
      store(s + v * W, ds);
    }
  }
}

// dq^T [D, lanes] = K^T dS^T, then to the rows of dq.
template <typename T>
template <int NV>
void Engine<T>::query_gradient(int64_t index, int64_t head, const T* ds, Scratch& scratch) {
  constexpr int lanes = NV * W;
  const FaSide& from = call_.student;
  const Block& block = blocks_[index];
  const Sample& s = samples_[block.sample];
  const int64_t stride = packed_stride<T>(from.size);
  const T* keys = packed(true, block, head);
  T* out = scratch.d_q.get();
  std::fill_n(out, from.size * lanes, T(0));
  for (int64_t k = 0; k < block.width(); k += kStep) {
    const Stretch<T> stretch{keys + k * stride, ds + k * lanes, std::min(kStep, block.width() - k), 1};
    multiply<T, NV, true>(&stretch, 1, {stride, lanes, lanes}, out, from.size);
  }
  const T factor = query_factor(from);
  for (int64_t i = 0; i < block.live; ++i) {
    T* row = static_cast<T*>(call_.d_q) +
             ((s.b * from.heads + head) * call_.rows + s.row[block.first + i]) * from.size;
    for (int64_t d = 0; d < from.size; ++d) row[d] += factor * out[d * lanes + i];
  }
}

// dk of one range of keys: the sum over every head that shares them and every row of the pass.
template <typename T>
void Engine<T>::key_gradient(const Pass& pass, int64_t sample, int64_t key_head, Range keys,
                             Scratch& scratch) {
  const FaSide& from = call_.student;
  const Sample& s = samples_[sample];
  const int64_t repeat = from.heads / from.key_heads, stride = packed_stride<T>(from.size);
  const Range heads = Range{key_head * repeat, (key_head + 1) * repeat}.clip(pass.heads);
  const int64_t padded = round_up(from.size, W);
  auto& stretches = scratch.stretches;
  stretches.clear();
  int64_t begin[kStep / kGranule + 1], strips = 0;
  for (int64_t k = keys.begin; k < keys.end; k += kGranule) {
    begin[strips++] = static_cast<int64_t>(stretches.size());
    for (int64_t h = heads.begin; h < heads.end; ++h)
      for (int64_t i = pass.blocks.begin; i < pass.blocks.end; ++i) {
        const Block& block = blocks_[i];
        if (block.sample != sample || k < block.keys.begin || k >= block.keys.end) continue;
        stretches.push_back({attention(pass, i, h) + (k - block.keys.begin) * block.lanes,
                             packed_queries(pass, i, h), block.live, block.lanes});
      }
  }
  begin[strips] = static_cast<int64_t>(stretches.size());
  if (stretches.empty()) return;
  T* tile = scratch.d_k.get();
  auto columns = [&](auto nv, int64_t d) {
    for (int64_t strip = 0; strip < strips; ++strip)
      multiply<T, decltype(nv)::value, false>(
          stretches.data() + begin[strip], begin[strip + 1] - begin[strip], {1, stride, stride},
          tile + strip * kGranule * stride + d, kGranule, d);
  };
  int64_t d = 0;
  for (; d + 2 * W <= padded; d += 2 * W) columns(Constant<2>(), d);
  if (d < padded) columns(Constant<1>(), d);
  for (int64_t k = keys.begin; k < std::min(keys.end, static_cast<int64_t>(s.key.size())); ++k) {
    const T* in = tile + (k - keys.begin) * stride;
    T* out = static_cast<T*>(call_.d_k) +
             ((s.b * from.key_heads + key_head) * call_.length + s.key[k]) * from.size;
    for (int64_t i = 0; i < from.size; ++i) out[i] += in[i];
  }
}

}  // namespace fastalign::FASTALIGN_ISA
