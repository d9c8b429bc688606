// The compared maps of a chunk, and the log-sum-exps behind them.
//
// For every block of rows and head of a side: S^T = K Q^T, P = exp(S - LSE), and the map A[g] gets
// w P (linear specs) or, for specs in logarithms, log A = log sum_h exp(S_h - LSE_h) - log H, kept as a
// running (maximum, sum). The two planes of a block, [G, C, lanes] of student and teacher, hold A or log A.
#pragma once

#include "engine.h"

namespace fastalign::FASTALIGN_ISA {

template <typename T> void Engine<T>::maps(int64_t index) {
  if (resident_ == index) return;
  enter(chunks_[index]);
  resident_ = index;
  const int64_t first = chunk_.blocks.begin;
  auto cost = [&](int64_t i) { return blocks_[first + i].tile(); };
  auto sweep = [&](bool student) {
    parallel(chunk_.blocks.size(), call_.threads, cost, [&](int64_t i, int64_t thread) {
      with_vectors(blocks_[first + i], [&](auto nv) {
        side_maps<decltype(nv)::value>(student, first + i, scratch_[thread]);
      });
    });
  };
  if (call_.teacher.heads) {
    pack_keys(false);
    sweep(false);
    int64_t held = 0;
    for (const auto& buffer : keys_[1]) held += buffer.bytes();
    if (held > call_.budget / 4)
      for (auto& buffer : keys_[1]) buffer.release();
  }
  pack_keys(true);
  sweep(true);
  parallel(chunk_.blocks.size(), call_.threads, cost,
           [&](int64_t i, int64_t) { finish_block(first + i); });
}

// Lays out a chunk's workspace; what a chunk before left in it is gone.
template <typename T> void Engine<T>::enter(const Chunk& chunk) {
  chunk_ = chunk;
  passes_ = passes(chunk);
  map_at_.assign(1, 0);
  int64_t widest = 0, widest_tile = 0, mask_count = 0, slab = 0, lanes = 0;
  for (int64_t i = chunk.blocks.begin; i < chunk.blocks.end; ++i) {
    Block& block = blocks_[i];
    block.masks = mask_count;
    mask_count += block.width();
    map_at_.push_back(map_at_.back() + map_size(block, chunk.groups.size()));
    widest = std::max(widest, block.columns.size() * block.lanes);
    widest_tile = std::max(widest_tile, block.tile());
    lanes += block.lanes;
  }
  for (const Pass& pass : passes_)
    slab = std::max(slab, (tile_at_[pass.blocks.end] - tile_at_[pass.blocks.begin]) * pass.heads.size());
  maps_.reset(map_at_.back());
  mass_.reset(chunk.blocks.size() * chunk.groups.size() * 3 * W);
  slab_.reset(slab);
  factor_.reset(call_.student.heads * lanes);
  masks_.resize(mask_count);
  const int64_t size = std::max(call_.student.size, call_.teacher.size);
  for (Scratch& scratch : scratch_) {
    scratch.scores.reset(widest_tile);
    scratch.queries.reset(3 * W * packed_stride<T>(size));
    scratch.transposed.reset(3 * W * size);
    scratch.column.reset(widest);
  }
  find_masks();
}

template <typename T> void Engine<T>::find_masks() {
  const int64_t first = chunk_.blocks.begin;
  parallel(chunk_.blocks.size(), call_.threads, [&](int64_t i) { return blocks_[first + i].width(); },
           [&](int64_t i, int64_t) {
    const Block& block = blocks_[first + i];
    const Sample& s = samples_[block.sample];
    const Visibility& visibility = visibility_[block.sample];
    const int32_t* positions = &s.position[block.first];
    const int32_t low = positions[0], high = positions[block.live - 1];
    const int32_t segment = visibility.segment(low);
    bool together = true;
    for (int64_t lane = 1; lane < block.live; ++lane)
      together = together && visibility.segment(positions[lane]) == segment;
    uint64_t* out = masks_.data() + block.masks;
    const auto count = static_cast<int64_t>(s.key.size());
    const uint64_t nobody = block.live == 64 ? 0 : ~uint64_t(0) << block.live;
    for (int64_t k = block.keys.begin; k < block.keys.end; ++k) {
      if (k >= count) *out++ = nobody;
      else if (together && visibility.plain(low, high, segment, s.key[k])) *out++ = ~uint64_t(0);
      else *out++ = visibility.bits(positions, block.live, s.key[k]);
    }
  });
}

// Keys of the chunk's samples as rows of reals; those of other samples are let go.
template <typename T> void Engine<T>::pack_keys(bool student) {
  const FaSide& from = side(student);
  Packed& to = keys_[student ? 0 : 1];
  const int64_t stride = packed_stride<T>(from.size), part = 256;
  const int64_t low = blocks_[chunk_.blocks.begin].sample;
  const int64_t high = blocks_[chunk_.blocks.end - 1].sample;
  struct Item { int64_t sample, head; Range keys; };
  std::vector<Item> items;
  for (int64_t i = 0; i < static_cast<int64_t>(samples_.size()); ++i) {
    if (i < low || i > high) to[i].release();
    else if (to[i].bytes() == 0) {
      const int64_t keys = samples_[i].all[0].end;
      to[i].reset(from.key_heads * keys * stride);
      for (int64_t h = 0; h < from.key_heads; ++h)
        for (int64_t k = 0; k < keys; k += part) items.push_back({i, h, {k, std::min(keys, k + part)}});
    }
  }
  parallel(static_cast<int64_t>(items.size()), call_.threads, [](int64_t) { return 1; },
           [&](int64_t i, int64_t) {
    const auto& [sample, head, keys] = items[i];
    const Sample& s = samples_[sample];
    T* out = to[sample].get() + (head * s.all[0].end + keys.begin) * stride;
    for (int64_t k = keys.begin; k < keys.end; ++k, out += stride) {
      if (k < static_cast<int64_t>(s.key.size()))
        read_row<T>(from.k, s.b, head, s.key[k], from.size, stride, T(1), out);
      else
        std::fill_n(out, stride, T(0));
    }
  });
}

template <typename T>
const T* Engine<T>::packed(bool student, const Block& block, int64_t head) const {
  const FaSide& from = side(student);
  const int64_t key_head = head / (from.heads / from.key_heads);
  return keys_[student ? 0 : 1][block.sample].get() +
         (key_head * samples_[block.sample].all[0].end + block.keys.begin) * packed_stride<T>(from.size);
}

template <typename T>
void Engine<T>::load_queries(const FaSide& from, const Block& block, int64_t head, T* rows) {
  const Sample& s = samples_[block.sample];
  const int64_t stride = packed_stride<T>(from.size);
  for (int64_t i = 0; i < block.lanes; ++i) {
    T* out = rows + i * stride;
    if (i < block.live)
      read_row<T>(from.q, s.b, head, s.row[block.first + i], from.size, stride, query_factor(from), out);
    else
      std::fill_n(out, stride, T(0));
  }
}

// All heads of one side for one block of rows.
template <typename T>
template <int NV>
void Engine<T>::side_maps(bool student, int64_t index, Scratch& scratch) {
  const FaSide& from = side(student);
  const Block& block = blocks_[index];
  const Sample& s = samples_[block.sample];
  const int64_t stride = packed_stride<T>(from.size);
  const bool exponentiate = keeps_exponentials(from), softmax = call_.normalize != kScores;
  const Range heads = head_range(from, student, chunk_);
  for (int64_t h = heads.begin; h < heads.end; ++h) {
    const bool kept = student && !passes_.empty() && passes_.back().holds(index, h);
    T* x = kept ? attention(passes_.back(), index, h) : scratch.scores.get();
    const bool known = from.given_lse != nullptr;
    const auto& ranges = kept || (softmax && !known) ? s.all : s.compared;
    load_queries(from, block, h, scratch.queries.get());
    transpose(scratch.queries.get(), stride, block.live, from.size, block.lanes,
              scratch.transposed.get());
    Vec<T> m[NV], sum[NV] = {}, lse[NV] = {}, f[NV] = {};
    scores<T, NV>(packed(student, block, h) - block.keys.begin * stride, stride,
                  scratch.transposed.get(), from.size, block, ranges, masks(block), cap(from),
                  softmax ? -kInfinity<T> : T(0), x, m);
    if (softmax) {
      T lanes[NV * W];
      const int64_t rows = (s.b * from.heads + h) * call_.rows;
      if (known) {
        gather(static_cast<const T*>(from.given_lse) + rows, block, T(0), lanes);
        for (int v = 0; v < NV; ++v) m[v] = lse[v] = load(lanes + v * W), f[v] = all<T>(T(1));
        if (exponentiate) exponentials<T, NV, true>(block, ranges, m, x, sum);
      } else {
        const T sink = from.sink ? static_cast<const T*>(from.sink)[h] / T(call_.temperature)
                                 : -kInfinity<T>;
        for (int v = 0; v < NV; ++v) {
          m[v] = max<T>(m[v], all<T>(sink));
          m[v] = m[v] == -kInfinity<T> ? Vec<T>{} : m[v];
        }
        if (exponentiate) exponentials<T, NV, true>(block, ranges, m, x, sum);
        else exponentials<T, NV, false>(block, ranges, m, x, sum);
        for (int v = 0; v < NV; ++v) {
          sum[v] += exp<T>(sink - m[v]);
          const Ints<T> some = sum[v] > 0;
          lse[v] = some ? m[v] + log<T>(sum[v]) : Vec<T>{};
          f[v] = some ? 1 / sum[v] : Vec<T>{};
        }
      }
      for (int v = 0; v < NV; ++v) store(lanes + v * W, lse[v]);
      scatter(lanes, block, static_cast<T*>(from.lse) + rows);
      if (kept)
        for (int v = 0; v < NV; ++v) store(factor(index, h) + v * W, f[v]);
    }
    absorb<NV>(student, index, h, x, lse, f, scratch);
  }
  if (call_.in_logs && style(student) == kMean) finish_logs<NV>(student, index, scratch);
}

// Adds one head to the maps; `s` holds its exponentials or scores.
template <typename T>
template <int NV>
void Engine<T>::absorb(bool student, int64_t index, int64_t head, const T* s, const Vec<T>* lse,
                       const Vec<T>* f, Scratch& scratch) {
  constexpr int lanes = NV * W;
  const Block& block = blocks_[index];
  const FaSide& from = side(student);
  const int32_t* key = samples_[block.sample].key_of_column.data();
  const int64_t how = style(student), first = block.columns.begin, columns = block.columns.size();
  const bool starts = head == head_range(from, student, chunk_).begin;
  auto line = [&](int64_t c) { return s + (key[first + c] - block.keys.begin) * lanes; };
  T* out = plane(student ? 0 : 1, index, how == kEach ? head - chunk_.groups.begin : 0);

  if (call_.in_logs) {
    T* sum = scratch.column.get();
    for (int64_t c = 0; c < columns; ++c)
      for (int v = 0; v < NV; ++v) {
        const Vec<T> x = load(line(c) + v * W) - lse[v];
        T* top = out + c * lanes + v * W;
        if (how == kEach || starts) {
          store(top, x);
          if (how != kEach) store(sum + c * lanes + v * W, all<T>(T(1)));
          continue;
        }
        // log-sum-exp, one exponential a step: (top, sum) <- (max, sum e^(top - max) + e^(x - max))
        const Vec<T> old = load(top), total = load(sum + c * lanes + v * W);
        const Vec<T> e = exp<T>(-abs<T>(x - old));
        store(sum + c * lanes + v * W, x > old ? total * e + 1 : total + e);
        store(top, max<T>(x, old));
      }
    return;
  }

  const T share = how == kMean ? T(1) / T(from.heads) : T(1);
  Vec<T> scale[NV];
  const bool exponentiated = keeps_exponentials(from), softmax = call_.normalize != kScores;
  for (int v = 0; v < NV; ++v) scale[v] = exponentiated ? f[v] * share : all<T>(share);
  auto add = [&](auto value) {
    for (int64_t c = 0; c < columns; ++c)
      for (int v = 0; v < NV; ++v) {
        const Vec<T> p = value(load(line(c) + v * W), v) * scale[v];
        if (how != kMix) {
          T* a = out + c * lanes + v * W;
          store(a, how == kEach || starts ? p : load(a) + p);
          continue;
        }
        const T* mix = static_cast<const T*>(call_.mix) + head * call_.groups + chunk_.groups.begin;
        for (int64_t g = 0; g < chunk_.groups.size(); ++g) {
          T* a = out + (g * columns + c) * lanes + v * W;
          store(a, starts ? p * mix[g] : load(a) + p * mix[g]);
        }
      }
  };
  if (exponentiated || !softmax) add([](Vec<T> x, int) { return x; });
  else add([&](Vec<T> x, int v) { return exp<T>(x - lse[v]); });
}

// log A = top + log sum - log H; -inf where hidden.
template <typename T>
template <int NV>
void Engine<T>::finish_logs(bool student, int64_t index, Scratch& scratch) {
  const Block& block = blocks_[index];
  const T log_heads = std::log(T(side(student).heads));
  T* top = plane(student ? 0 : 1, index, 0);
  const T* sum = scratch.column.get();
  for (int64_t c = block.columns.begin; c < block.columns.end; ++c) {
    const uint64_t seen = column_mask(block, c);
    for (int v = 0; v < NV; ++v, top += W, sum += W)
      store(top, where_seen<T>(seen, v, load(top) + (log<T>(load(sum)) - log_heads), -kInfinity<T>));
  }
}

// log A <- log A - log sum_V A, row by row; the subtracted number is kept in mass().
template <typename T> void Engine<T>::renormalise(int64_t which, int64_t index) {
  const Block& block = blocks_[index];
  for (int64_t g = 0; g < chunk_.groups.size(); ++g)
    for (int64_t v = 0; v < block.lanes / W; ++v) {
      T* a = plane(which, index, g) + v * W;
      Vec<T> top = all<T>(-kInfinity<T>), sum{};
      for (int64_t c = 0; c < block.columns.size(); ++c) top = max<T>(top, load(a + c * block.lanes));
      top = top == -kInfinity<T> ? Vec<T>{} : top;
      for (int64_t c = 0; c < block.columns.size(); c += kPartial) {
        Vec<T> partial{};
        for (int64_t d = c; d < std::min(block.columns.size(), c + kPartial); ++d)
          partial += exp<T>(load(a + d * block.lanes) - top);
        sum += partial;
      }
      const Vec<T> total = sum > 0 ? top + log<T>(sum) : Vec<T>{};
      for (int64_t c = 0; c < block.columns.size(); ++c)
        store(a + c * block.lanes, load(a + c * block.lanes) - total);
      if (which == 0) store(mass(index, g) + v * W, total);
    }
}

// The teacher's plane from a given map (maths.given_map), dense or sparse.
template <typename T> void Engine<T>::read_target(int64_t index) {
  const Block& block = blocks_[index];
  const Sample& s = samples_[block.sample];
  const int64_t first = block.columns.begin, columns = block.columns.size(), lanes = block.lanes;
  for (int64_t g = 0; g < chunk_.groups.size(); ++g) {
    T* out = plane(1, index, g);
    std::fill_n(out, columns * lanes, T(0));
    for (int64_t i = 0; i < block.live; ++i) {
      const int64_t row = (s.b * call_.groups + chunk_.groups.begin + g) * call_.target_rows +
                          s.ordinal[block.first + i];
      const T* values = static_cast<const T*>(call_.target) + row * call_.target_width;
      const int64_t* places = call_.target_index ? call_.target_index + row * call_.target_width : nullptr;
      auto put = [&](int64_t column, T value) {
        if (column >= block.columns.begin && column < block.columns.end &&
            column_mask(block, column) >> i & 1)
          out[(column - first) * lanes + i] += value;
      };
      if (places)
        for (int64_t k = 0; k < call_.target_width; ++k) put(places[k], values[k]);
      else
        for (int64_t c = first; c < first + columns; ++c) put(c, values[c]);
      T total = 0;
      if (call_.normalize == kVisual) {
        for (int64_t c = 0; c < columns; ++c) total += out[c * lanes + i];
        for (int64_t c = 0; total > 0 && c < columns; ++c) out[c * lanes + i] /= total;
      }
    }
    if (!call_.in_logs) continue;
    const T tiny = std::numeric_limits<T>::min();
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t v = 0; v < lanes; v += W, out += W)
        store(out, where_seen<T>(column_mask(block, first + c), static_cast<int>(v / W),
                                 log<T>(max<T>(load(out), all<T>(tiny))), -kInfinity<T>));
  }
}

template <typename T> void Engine<T>::finish_block(int64_t index) {
  const Block& block = blocks_[index];
  if (call_.normalize == kVisual) {
    renormalise(0, index);
    if (call_.teacher.heads) renormalise(1, index);
  }
  if (call_.target && !call_.pooled) read_target(index);
  if (!call_.teacher.heads && call_.pooled)  // its place is taken after pooling
    std::fill_n(plane(1, index, 0), chunk_.groups.size() * block.columns.size() * block.lanes, T(0));
  if (chunk_.groups.begin == 0) count_entries(block);
  if (call_.sink_filter) block_moments(index);
  else if (!call_.pooled) block_statistics(index);
}

}  // namespace fastalign::FASTALIGN_ISA
