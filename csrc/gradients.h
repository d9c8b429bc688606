// From coefficients to dq, dk and dmix.
//
// With E the gradient by a map's entry (or by its logarithm) and w the head's weight in the map,
//
//     X = P w E   or   X = exp(log P - log A) w E;   dS = X - P sum_V X;
//     dq = scale dS k;   dk = scale dS^T q
//
// for every visible key: those outside V get the second term alone. A thread takes a key head and a few
// blocks, strip by strip of the keys: for each of its heads dS of all blocks, their dq, and from the same
// strip dk, while keys, E and dS are near. Where threads outnumber key heads, dS of several heads and blocks
// comes first and dk follows, with the same chain of additions for every element.
#pragma once

#include "head_gradient.h"

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
  if (call_.wanted & kWantMix) {
    const int64_t parts = chunk_.blocks.size() * s.heads * groups;
    mix_parts_.reset(parts);
    std::fill_n(mix_parts_.get(), parts, T(0));
  }
  pack_key_pairs();
  for (int64_t p = static_cast<int64_t>(passes_.size()) - 1; p >= 0; --p)
    with_product(s, [&](auto op) {
      pass_gradients<decltype(op)>(passes_[p], p + 1 == static_cast<int64_t>(passes_.size()));
    });
  if (call_.wanted & kWantMix) {
    T* out = static_cast<T*>(call_.d_mix);
    for (int64_t block = 0; block < chunk_.blocks.size(); ++block)
      for (int64_t h = 0; h < s.heads; ++h)
        for (int64_t g = 0; g < groups; ++g)
          out[h * call_.groups + chunk_.groups.begin + g] +=
              mix_parts_.get()[(block * s.heads + h) * groups + g];
  }
}

// dq and dk of a pass.
template <typename T>
template <typename Op>
void Engine<T>::pass_gradients(const Pass& pass, bool resident) {
  const FaSide& s = call_.student;
  const int64_t repeat = s.heads / s.key_heads;
  const int64_t low = blocks_[pass.blocks.begin].sample, high = blocks_[pass.blocks.end - 1].sample;
  const int64_t key_heads = (pass.heads.end - 1) / repeat + 1 - pass.heads.begin / repeat;
  const int64_t owners = (high - low + 1) * key_heads;
  query_rows_.reset((lane_at_[pass.blocks.end] - lane_at_[pass.blocks.begin]) * pass.slots() *
                    packed_stride<T>(s.size));
  for (Scratch& scratch : scratch_) {
    scratch.d_q.reset(places() * 3 * W * s.size);
    scratch.d_k.reset(kStep * packed_stride<T>(s.size));
    scratch.delta.reset(places() * 3 * W);
  }
  if (owners % call_.threads == 0 || owners >= 4 * call_.threads) owned_gradients<Op>(pass, resident);
  else shared_gradients<Op>(pass, resident);
}

// dS and dq of some heads of a key head for some blocks of a sample, strip by strip of the keys from keys.begin
// on; then(head, strip) follows each. slopes(head, block, key): where dS goes from that key on.
template <typename T>
template <typename Op, typename Slopes, typename Then>
void Engine<T>::head_gradients(const Pass& pass, bool resident, Range heads, Range blocks, Range keys,
                               Slopes slopes, Then then, Scratch& scratch) {
  auto each = [&](int64_t head, auto f) {  // f(block, its place in the scratch, vectors)
    for (int64_t block = blocks.begin; block < blocks.end; ++block)
      with_vectors(blocks_[block], [&](auto nv) {
        f(block, (head - heads.begin) * blocks.size() + block - blocks.begin, nv);
      });
  };
  for (int64_t h = heads.begin; h < heads.end; ++h)
    each(h, [&](int64_t block, int64_t place, auto nv) {
      enter_head<Op, decltype(nv)::value>(pass, resident, block, h, scratch, place);
    });
  for (int64_t k = keys.begin / kStep * kStep; k < keys.end; k += kStep)
    for (int64_t h = heads.begin; h < heads.end; ++h) {
      each(h, [&](int64_t block, int64_t place, auto nv) {
        strip_gradient<Op, decltype(nv)::value>(pass, block, h, {k, k + kStep}, scratch, place,
                                                slopes(h, block, std::max(k, blocks_[block].keys.begin)));
      });
      then(h, Range{k, k + kStep}.clip(keys));
    }
  if (call_.wanted & kWantQ)
    for (int64_t h = heads.begin; h < heads.end; ++h)
      each(h, [&](int64_t block, int64_t place, auto) {
        store_query_gradient(block, h, scratch.d_q.get() + place * 3 * W * call_.student.size);
      });
}

// Each key head of a sample belongs to one thread, which takes its dk along.
template <typename T>
template <typename Op>
void Engine<T>::owned_gradients(const Pass& pass, bool resident) {
  const FaSide& s = call_.student;
  const int64_t repeat = s.heads / s.key_heads;
  // With a plane of X for each block, blocks go one by one: several would not fit the budget.
  const int64_t together = keeps_exponentials(s) && call_.heads != kMix ? kTogether : 1;
  for (Scratch& scratch : scratch_) {
    scratch.slopes.reset(together * kStep * 3 * W);
    scratch.stretches.reset(kStep / kGranule * together * int64_t(sizeof(Stretch<typename Op::Element>)));
  }
  struct Item { int64_t key_head; Range blocks; };
  std::vector<Item> items;
  each_sample(pass.blocks, [&](Range blocks) {
    for (const Range run : pass.runs())
      for (int64_t kv = run.begin / repeat; kv * repeat < run.end; ++kv) items.push_back({kv, blocks});
  });
  parallel(static_cast<int64_t>(items.size()), call_.threads, [](int64_t) { return 1; },
           [&](int64_t i, int64_t thread) {
    const auto& [key_head, part] = items[i];
    Scratch& scratch = scratch_[thread];
    const int64_t sample = blocks_[part.begin].sample;
    const Range mine = pass.of(key_head);
    // As many heads at once as have their dq in the second cache; their blocks, then, are all at once, too.
    const int64_t heads = together > 1 && part.size() <= together ? places() / part.size() : 1;
    for (int64_t h = mine.begin; h < mine.end; h += heads)
      for (int64_t first = part.begin; first < part.end; first += together) {
        const Range now = Range{first, first + together}.clip(part);
        // the first to come writes all of dk, the others add to their part of it
        const bool fresh = fresh_[sample * s.key_heads + key_head] && h == mine.begin && first == part.begin;
        Range keys = samples_[sample].all[0];
        if (!fresh) {
          keys = blocks_[first].keys;
          for (int64_t block = first; block < now.end; ++block)
            keys = {std::min(keys.begin, blocks_[block].keys.begin),
                    std::max(keys.end, blocks_[block].keys.end)};
        }
        auto slopes = [&](int64_t, int64_t block, int64_t k) {
          return scratch.slopes.get() + (block - first) * kStep * 3 * W +
                 (k - std::max(k / kStep * kStep, blocks_[block].keys.begin)) * blocks_[block].lanes;
        };
        head_gradients<Op>(pass, resident, Range{h, h + heads}.clip(mine), now, keys, slopes,
                           [&](int64_t head, Range strip) {
          if (!(call_.wanted & kWantK)) return;
          const Range one{head, head + 1};
          if (fresh && head == h) key_gradient<Op, true>(pass, one, now, strip, sample, slopes, scratch);
          else key_gradient<Op, false>(pass, one, now, strip, sample, slopes, scratch);
        }, scratch);
      }
  });
  for (const Range run : pass.runs()) each_sample(pass.blocks, [&](Range blocks) { written(run, blocks); });
}

// More threads than key heads: dS of as many heads and blocks as an eighth of the budget holds, each by
// itself, then dk from them, strip by strip.
template <typename T>
template <typename Op>
void Engine<T>::shared_gradients(const Pass& pass, bool resident) {
  const FaSide& s = call_.student;
  const int64_t repeat = s.heads / s.key_heads, room = call_.budget / 8 / int64_t(sizeof(T));
  std::vector<int64_t> at(1, 0);  // entries of the blocks before
  for (int64_t block = pass.blocks.begin; block < pass.blocks.end; ++block)
    at.push_back(at.back() + blocks_[block].width() * blocks_[block].lanes);
  const int64_t step = std::clamp<int64_t>(room / at.back(), 1, pass.heads.size());
  for (const Range run : pass.runs())
    for (int64_t h = run.begin; h < run.end; h += step)
      for (int64_t first = 0, next; first < pass.blocks.size(); first = next) {
        next = first + 1;
        while (next < pass.blocks.size() && (at[next + 1] - at[first]) * step <= room) ++next;
        const Range heads = Range{h, h + step}.clip(run);
        const Range blocks{pass.blocks.begin + first, pass.blocks.begin + next};
        const int64_t size = at[next] - at[first];
        slopes_.reset(size * heads.size());
        for (Scratch& scratch : scratch_)
          scratch.stretches.reset(kStep / kGranule * blocks.size() * std::min(heads.size(), repeat) *
                                  int64_t(sizeof(Stretch<typename Op::Element>)));
        auto slopes = [&](int64_t head, int64_t block, int64_t k) {
          return slopes_.get() + (head - h) * size + at[block - pass.blocks.begin] - at[first] +
                 (k - blocks_[block].keys.begin) * blocks_[block].lanes;
        };
        parallel(blocks.size() * heads.size(), call_.threads,
                 [&](int64_t i) { return blocks_[blocks.begin + i % blocks.size()].tile(); },
                 [&](int64_t i, int64_t thread) {
          const int64_t block = blocks.begin + i % blocks.size();
          const int64_t head = h + i / blocks.size();
          head_gradients<Op>(pass, resident, {head, head + 1}, {block, block + 1}, blocks_[block].keys, slopes,
                             [](int64_t, Range) {}, scratch_[thread]);
        });
        if (!(call_.wanted & kWantK)) continue;
        struct Item { int64_t sample, key_head; Range keys; };
        std::vector<Item> items;
        each_sample(blocks, [&](Range mine) {
          const int64_t sample = blocks_[mine.begin].sample;
          for (int64_t kv = heads.begin / repeat; kv * repeat < heads.end; ++kv)
            for (int64_t k = 0; k < samples_[sample].all[0].end; k += kStep)
              items.push_back({sample, kv, Range{k, k + kStep}.clip(samples_[sample].all[0])});
        });
        parallel(static_cast<int64_t>(items.size()), call_.threads, [](int64_t) { return 1; },
                 [&](int64_t i, int64_t thread) {
          const auto& [sample, kv, keys] = items[i];
          const Range mine = Range{kv * repeat, (kv + 1) * repeat}.clip(heads);
          if (fresh_[sample * s.key_heads + kv])
            key_gradient<Op, true>(pass, mine, blocks, keys, sample, slopes, scratch_[thread]);
          else key_gradient<Op, false>(pass, mine, blocks, keys, sample, slopes, scratch_[thread]);
        });
        each_sample(blocks, [&](Range mine) { written(heads, mine); });
      }
}

// f(blocks of one sample) for every sample that has some of these.
template <typename T>
template <typename F>
void Engine<T>::each_sample(Range blocks, F f) const {
  for (int64_t first = blocks.begin, next; first < blocks.end; first = next) {
    next = first + 1;
    while (next < blocks.end && blocks_[next].sample == blocks_[first].sample) ++next;
    f(Range{first, next});
  }
}

// From now on dk of these heads, for the sample of these blocks, is added to.
template <typename T> void Engine<T>::written(Range heads, Range blocks) {
  const int64_t repeat = call_.student.heads / call_.student.key_heads;
  for (int64_t kv = heads.begin / repeat; kv * repeat < heads.end; ++kv)
    fresh_[blocks_[blocks.begin].sample * call_.student.key_heads + kv] = false;
}

// Zeros where no pass will write: rows without a block, keys outside the sweep; and where several add.
template <typename T> void Engine<T>::clear_gradients() {
  const FaSide& s = call_.student;
  std::vector<std::vector<char>> rows(call_.batch), keys(call_.batch);
  for (const Block& block : blocks_) {
    const Sample& sample = samples_[block.sample];
    auto& seen = rows[sample.b];
    seen.resize(call_.rows);
    for (int64_t i = 0; i < block.live; ++i) seen[sample.row[block.first + i]] = true;
    if (!keys[sample.b].empty()) continue;
    keys[sample.b].resize(call_.length);
    for (const int32_t k : sample.key) keys[sample.b][k] = true;
  }
  auto clear = [&](void* out, int64_t heads, int64_t length, const std::vector<std::vector<char>>& written,
                   bool everything) {
    prefer_large_pages(out, call_.batch * heads * length * s.size * int64_t(sizeof(T)));
    parallel(call_.batch * heads, call_.threads, [](int64_t) { return 1; }, [&](int64_t i, int64_t) {
      const auto& seen = written[i / heads];
      T* to = static_cast<T*>(out) + i * length * s.size;
      for (int64_t n = 0; n < length; ++n, to += s.size)
        if (everything || seen.empty() || !seen[n]) std::fill_n(to, s.size, T(0));
    });
  };
  if (call_.wanted & kWantQ) clear(call_.d_q, s.heads, call_.rows, rows, adds_queries_);
  if (call_.wanted & kWantK) clear(call_.d_k, s.key_heads, call_.length, keys, false);
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


}  // namespace fastalign::FASTALIGN_ISA
