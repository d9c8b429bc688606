// From maps to a few numbers a row: statistics, the moments of the sink filter, sums over rows.
#pragma once

#include "engine.h"

namespace fastalign::FASTALIGN_ISA {

// 1 where an entry is compared, else 0: visible, and under both thresholds of the sink filter.
template <typename T>
Vec<T> Engine<T>::keep(const Block& block, int64_t column, int v, Vec<T> s, Vec<T> t,
                       int64_t group) const {
  Vec<T> kept = where_seen<T>(column_mask(block, column), v, all<T>(T(1)), T(0));
  if (thresholds_) {
    if (call_.in_logs) s = exp<T>(s), t = exp<T>(t);
    const int64_t at = samples_[block.sample].b * call_.groups + chunk_.groups.begin + group;
    const T low_s = thresholds_[at], low_t = thresholds_[call_.batch * call_.groups + at];
    kept = (s <= low_s) & (t <= low_t) & (t != 0) ? kept : Vec<T>{};
  }
  return kept;
}

template <typename T> void Engine<T>::count_entries(const Block& block) {
  T count[3 * W] = {};
  int64_t everywhere = 0;
  for (int64_t c = block.columns.begin; c < block.columns.end; ++c) {
    const uint64_t seen = column_mask(block, c);
    if (~seen == 0) ++everywhere;
    else
      for (int64_t i = 0; i < block.live; ++i) count[i] += T(seen >> i & 1);
  }
  for (T& n : count) n += T(everywhere);
  scatter(count, block, static_cast<T*>(call_.entries) + samples_[block.sample].b * call_.rows);
}

template <typename T> void Engine<T>::block_statistics(int64_t index) {
  const Block& block = blocks_[index];
  const int64_t b = samples_[block.sample].b, columns = block.columns.size();
  const int count = statistic_count(call_.divergence);
  for_divergence(call_.divergence, call_.in_logs, [&](auto divergence, auto in_logs) {
    for (int64_t g = 0; g < chunk_.groups.size(); ++g) {
      T lanes[3][3 * W];
      for (int v = 0; v < block.lanes / W; ++v) {
        const T *s = plane(0, index, g) + v * W, *t = plane(1, index, g) + v * W;
        Vec<T> sum[3] = {};
        for (int64_t from = 0; from < columns; from += kPartial) {
          Vec<T> partial[3] = {};
          for (int64_t c = from; c < std::min(columns, from + kPartial); ++c) {
            const Vec<T> x = load(s + c * block.lanes), y = load(t + c * block.lanes);
            add_statistics<T, decltype(divergence)::value, decltype(in_logs)::value != 0>(
                x, y, keep(block, block.columns.begin + c, v, x, y, g), partial);
          }
          for (int n = 0; n < count; ++n) sum[n] += partial[n];
        }
        for (int n = 0; n < count; ++n) store(lanes[n] + v * W, sum[n]);
      }
      for (int n = 0; n < count; ++n)
        scatter(lanes[n], block,
                static_cast<T*>(call_.statistics) +
                    by_row(n * call_.batch + b, chunk_.groups.begin + g));
    }
  });
}

// sum_j A and sum_j (A - mean)^2 of every row over all columns of the sample, hidden ones as zeros: what
// maths.sink_threshold turns into mean + sigma std.
template <typename T> void Engine<T>::block_moments(int64_t index) {
  const Block& block = blocks_[index];
  const Sample& sample = samples_[block.sample];
  const auto width = static_cast<int64_t>(sample.key_of_column.size());
  const int64_t columns = block.columns.size();
  for (int which = 0; which < 2; ++which)
    for (int64_t g = 0; g < chunk_.groups.size(); ++g) {
      T totals[3 * W], squares[3 * W];
      for (int64_t v = 0; v < block.lanes; v += W) {
        const T* a = plane(which, index, g) + v;
        auto sum = [&](auto term) {
          Vec<T> total{};
          for (int64_t from = 0; from < columns; from += kPartial) {
            Vec<T> partial{};
            for (int64_t c = from; c < std::min(columns, from + kPartial); ++c) {
              const Vec<T> x = load(a + c * block.lanes);
              partial += term(call_.in_logs ? exp<T>(x) : x);
            }
            total += partial;
          }
          return total;
        };
        const Vec<T> total = sum([](Vec<T> x) { return x; }), mean = total / T(width);
        store(totals + v, total);
        store(squares + v, sum([&](Vec<T> x) { return (x - mean) * (x - mean); }) +
                               T(width - columns) * mean * mean);
      }
      T* out = static_cast<T*>(call_.moments);
      const int64_t group = chunk_.groups.begin + g;
      scatter(totals, block, out + by_row((2 * which) * call_.batch + sample.b, group));
      scatter(squares, block, out + by_row((2 * which + 1) * call_.batch + sample.b, group));
    }
}

template <typename T> void Engine<T>::statistics(int64_t index, const void* thresholds) {
  maps(index);
  thresholds_ = static_cast<const T*>(thresholds);
  const int64_t first = chunk_.blocks.begin;
  parallel(chunk_.blocks.size(), call_.threads, [&](int64_t i) { return blocks_[first + i].tile(); },
           [&](int64_t i, int64_t) { block_statistics(first + i); });
  thresholds_ = nullptr;
}

// Sums over the rows of a chunk, added to pool [5, B, G, L]: A_s, A_t (linear) or running log-sum-exps
// in their logarithms' places, and the weights of the rows that keep the column. A column belongs to one
// item, which takes the blocks in order.
template <typename T> void Engine<T>::pool(int64_t index, const void* thresholds) {
  maps(index);
  thresholds_ = static_cast<const T*>(thresholds);
  struct Item { int64_t sample, group; Range columns; };
  std::vector<Item> items;
  const int64_t low = blocks_[chunk_.blocks.begin].sample;
  const int64_t high = blocks_[chunk_.blocks.end - 1].sample, part = 256;
  for (int64_t s = low; s <= high; ++s) {
    const auto columns = static_cast<int64_t>(samples_[s].key_of_column.size());
    for (int64_t g = 0; g < chunk_.groups.size(); ++g)
      for (int64_t c = 0; c < columns; c += part) items.push_back({s, g, {c, std::min(columns, c + part)}});
  }
  parallel(static_cast<int64_t>(items.size()), call_.threads, [](int64_t) { return 1; },
           [&](int64_t i, int64_t) {
    for (int64_t block = chunk_.blocks.begin; block < chunk_.blocks.end; ++block)
      if (blocks_[block].sample == items[i].sample) pool_block(block, items[i].group, items[i].columns);
  });
  thresholds_ = nullptr;
}

template <typename T> void Engine<T>::pool_block(int64_t index, int64_t group, Range columns) {
  const Block& block = blocks_[index];
  const Sample& sample = samples_[block.sample];
  T weight[3 * W];
  gather(static_cast<const T*>(call_.weight) + sample.b * call_.rows, block, T(0), weight);
  const int64_t step = call_.batch * call_.groups * call_.length;
  T* out = static_cast<T*>(call_.pool) +
           (sample.b * call_.groups + chunk_.groups.begin + group) * call_.length;
  const Range part = columns.clip(block.columns);
  for (int64_t c = part.begin; c < part.end; ++c) {
    const int64_t at = (c - block.columns.begin) * block.lanes;
    const int64_t place = sample.key[sample.key_of_column[c]];
    T w[3 * W], a[2][3 * W];
    T count = 0;
    for (int v = 0; v < block.lanes / W; ++v) {
      const Vec<T> s = load(plane(0, index, group) + at + v * W);
      const Vec<T> t = load(plane(1, index, group) + at + v * W);
      store(w + v * W, keep(block, c, v, s, t, group) * load(weight + v * W));
      store(a[0] + v * W, s);
      store(a[1] + v * W, t);
    }
    for (int64_t i = 0; i < block.live; ++i) count += w[i];
    if (count == 0) continue;
    const bool before = out[4 * step + place] > 0;
    for (int which = 0; which < 2; ++which) {
      if (!call_.in_logs) {
        double sum = 0;  // a plain chain of rows in float would lose too much
        for (int64_t i = 0; i < block.live; ++i) sum += w[i] > 0 ? double(w[i]) * a[which][i] : 0.0;
        out[which * step + place] += T(sum);
        continue;
      }
      T& total = out[(2 + which) * step + place];
      T top = before ? total : -kInfinity<T>, sum = 0;
      for (int64_t i = 0; i < block.live; ++i)
        if (w[i] > 0) top = std::max(top, a[which][i]);
      if (before) sum += std::exp(total - top);
      for (int64_t i = 0; i < block.live; ++i)
        if (w[i] > 0) sum += w[i] * std::exp(a[which][i] - top);
      total = top + std::log(sum);
    }
    out[4 * step + place] += count;
  }
}

}  // namespace fastalign::FASTALIGN_ISA
