// The compared maps of a chunk, and the log-sum-exps behind them.
//
// For every block of rows and head of a side: S^T = K Q^T, P = exp(S - LSE), and the map A[g] gets
// w P (linear specs) or, for specs in logarithms, log A = log sum_h exp(S_h - LSE_h) - log H, kept as a
// running (maximum, sum). The two planes of a block, [G, C, lanes] of student and teacher, hold A or log A.
#pragma once

#include "keys.h"

namespace fastalign::FASTALIGN_ISA {

template <typename T> void Engine<T>::maps(int64_t index) {
  if (resident_ == index) return;
  enter(chunks_[index]);
  resident_ = index;
  const int64_t first = chunk_.blocks.begin;
  const int64_t held = call_.teacher.heads ? pack_keys(false) : 0;
  if (held > call_.budget / 4) {  // one side after the other, so that its packed keys can go
    sweep({1, 2});
    for (auto& buffer : keys_[1]) buffer.release();
    pack_keys(true);
    sweep({0, 1});
  } else {
    pack_keys(true);
    sweep({0, call_.teacher.heads ? 2 : 1});
  }
  parallel(chunk_.blocks.size(), call_.threads, [&](int64_t i) { return blocks_[first + i].tile(); },
           [&](int64_t i, int64_t) { finish_block(first + i); });
}

// The maps of all blocks of the chunk; sides: 0 the student, 1 the teacher. An item is one side of a few
// blocks, taken together head by head, so that a head's keys come from memory once for all of them. Where
// blocks are too few for the threads, these share the heads of a block instead.
template <typename T> void Engine<T>::sweep(Range sides) {
  struct Item { bool student; Range blocks; };
  std::vector<Item> items;
  for (int64_t which = sides.begin; which < sides.end; ++which) {
    if (by_heads(which == 0)) {
      with_product(side(which == 0), [&](auto op) { sweep_heads<decltype(op)>(which == 0); });
      continue;
    }
    for (int64_t from = chunk_.blocks.begin; from < chunk_.blocks.end; from += together_)
      items.push_back({which == 0, Range{from, from + together_}.clip(chunk_.blocks)});
  }
  parallel(static_cast<int64_t>(items.size()), call_.threads,
           [&](int64_t i) {
             const auto& [student, blocks] = items[i];
             return (tile_at_[blocks.end] - tile_at_[blocks.begin]) *
                    head_range(side(student), student, chunk_).size();
           },
           [&](int64_t i, int64_t thread) {
             const auto& [student, blocks] = items[i];
             with_product(side(student), [&, student = student, blocks = blocks](auto op) {
               using Op = decltype(op);
               const Range heads = head_range(side(student), student, chunk_);
               const int64_t step = adds_exponentials(student) ? kPair : 1;
               for (int64_t h = heads.begin; h < heads.end; h += step)
                 for (int64_t block = blocks.begin; block < blocks.end; ++block)
                   with_vectors(blocks_[block], [&](auto nv) {
                     head_maps<Op, decltype(nv)::value>(student, block, Range{h, h + step}.clip(heads),
                                                        scratch_[thread], block - blocks.begin);
                   });
             });
           });
}

// One side, as many heads at a time as the threads and the tiles' room allow: their tiles, then their share of
// the maps, cut by columns.
template <typename T>
template <typename Op>
void Engine<T>::sweep_heads(bool student) {
  constexpr int64_t part = 2048;
  const Range all = head_range(side(student), student, chunk_), blocks = chunk_.blocks;
  const int64_t size = widest_tile(blocks), fit = call_.budget / 4 / int64_t(sizeof(T)) / (size * blocks.size());
  const int64_t step = std::clamp<int64_t>(fit / call_.threads * call_.threads, call_.threads, kMostHeads);
  tiles_.reset(step * blocks.size() * size);
  struct Item { int64_t block; Range columns; };
  std::vector<Item> items;
  for (int64_t block = blocks.begin; block < blocks.end; ++block)
    for (int64_t c = 0; c < blocks_[block].columns.size(); c += part)
      items.push_back({block, Range{c, c + part}.clip({0, blocks_[block].columns.size()})});
  for (int64_t first = all.begin; first < all.end; first += step) {
    const Range heads = Range{first, first + step}.clip(all);
    auto where = [&](int64_t block, int64_t head) {
      return tile_of<Op>(student, block, head,
                         tiles_.get() + ((head - first) * blocks.size() + block - blocks.begin) * size);
    };
    parallel(heads.size() * blocks.size(), call_.threads,
             [&](int64_t i) { return blocks_[blocks.begin + i % blocks.size()].tile(); },
             [&](int64_t i, int64_t thread) {
      const int64_t block = blocks.begin + i % blocks.size(), head = first + i / blocks.size();
      with_vectors(blocks_[block], [&](auto nv) {
        Vec<T> lse[decltype(nv)::value];
        head_tile<Op, decltype(nv)::value>(student, block, head, where(block, head), lse, scratch_[thread]);
      });
    });
    parallel(static_cast<int64_t>(items.size()), call_.threads,
             [&](int64_t i) { return items[i].columns.size(); },
             [&](int64_t i, int64_t) {
      const auto& [block, columns] = items[i];
      Tile<Op> tiles[kMostHeads];
      for (int64_t h = heads.begin; h < heads.end; ++h) tiles[h - first] = where(block, h);
      with_vectors(blocks_[block], [&, block = block, columns = columns](auto nv) {
        add_exponentials<Op, decltype(nv)::value>(student, block, heads, tiles, columns);
      });
    });
  }
}

// Lays out a chunk's workspace; what a chunk before left in it is gone.
template <typename T> void Engine<T>::enter(const Chunk& chunk) {
  chunk_ = chunk;
  passes_ = passes(chunk);
  map_at_.assign(1, 0);
  int64_t widest = 0, mask_count = 0, slab = 0;
  for (int64_t i = chunk.blocks.begin; i < chunk.blocks.end; ++i) {
    Block& block = blocks_[i];
    block.masks = mask_count;
    mask_count += block.width();
    map_at_.push_back(map_at_.back() + map_size(block, chunk.groups.size()));
    widest = std::max(widest, block.columns.size() * block.lanes);
  }
  for (const Pass& pass : passes_)
    slab = std::max(slab, (tile_at_[pass.blocks.end] - tile_at_[pass.blocks.begin]) * pass.slots());
  maps_.reset(map_at_.back());
  mass_.reset(chunk.blocks.size() * chunk.groups.size() * 3 * W);
  slab_.reset(slab);
  masks_.resize(mask_count);
  // as many blocks as leave every thread some, with maps that stay in a near cache
  constexpr int64_t near = 4 << 20;
  const int64_t share = (chunk.blocks.size() + call_.threads - 1) / call_.threads;
  together_ = std::clamp<int64_t>(near / int64_t(sizeof(T)) / widest, 1, share);
  widest_ = widest;
  const int64_t size = std::max(call_.student.size, call_.teacher.size);
  for (Scratch& scratch : scratch_) {
    if (!by_heads(true) || (call_.teacher.heads && !by_heads(false)))
      scratch.scores.reset(kPair * widest_tile(chunk.blocks));
    scratch.strip.reset(kStep * 3 * W);
    scratch.queries.reset(3 * W * packed_stride<T>(size));
    scratch.transposed.reset(3 * W * size);
    if (!keeps_exponentials(call_.student) || !keeps_exponentials(call_.teacher) || call_.heads == kMix)
      scratch.column.reset(widest * together_);
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
    for (int64_t k = block.keys.begin; k < block.keys.end; ++k) {
      if (k >= count) *out++ = 0;
      else if (together && visibility.plain(low, high, segment, s.key[k])) *out++ = ~uint64_t(0);
      else *out++ = visibility.bits(positions, block.live, s.key[k]);
    }
  });
}

// S of a strip for the head whose queries lie in scratch.transposed.
template <typename T>
template <typename Op, int NV>
void Engine<T>::score_strip(Rows<typename Op::Element> keys, bool student, const Block& block, Range strip,
                            T hidden, Scratch& scratch, T* s, Vec<T>* top) {
  const FaSide& from = side(student);
  const auto end = static_cast<int64_t>(samples_[block.sample].key.size());
  const auto* queries = reinterpret_cast<const typename Op::Element*>(scratch.transposed.get());
  FASTALIGN_ISA::score_strip<Op, NV>(keys, end, queries, words<Op>(from), strip,
                                     masks(block) + (strip.begin - block.keys.begin), cap(from),
                                     query_factor(from), hidden, s, top);
}

// A tile's place: in the slab if it is kept, else where it is worked in.
template <typename T>
template <typename Op>
auto Engine<T>::tile_of(bool student, int64_t index, int64_t head, T* else_at) -> Tile<Op> {
  return tile<Op>(is_kept(student, index, head) ? attention(passes_.back(), index, head) : else_at, blocks_[index]);
}

// Some heads of one side for one block of rows: their log-sum-exps, their share of the maps. `place` counts
// the blocks that a thread takes together.
template <typename T>
template <typename Op, int NV>
void Engine<T>::head_maps(bool student, int64_t index, Range heads, Scratch& scratch, int64_t place) {
  const FaSide& from = side(student);
  const int64_t size = tile_size(from, blocks_[index]);
  Tile<Op> tiles[kPair];
  Vec<T> lse[NV];
  for (int64_t h = heads.begin, n = 0; h < heads.end; ++h, ++n) {
    tiles[n] = tile_of<Op>(student, index, h, scratch.scores.get() + n * size);
    head_tile<Op, NV>(student, index, h, tiles[n], lse, scratch);
  }
  if (adds_exponentials(student))
    return add_exponentials<Op, NV>(student, index, heads, tiles, {0, blocks_[index].columns.size()});
  T* log_sums = call_.in_logs ? scratch.column.get() + place * widest_ : nullptr;
  absorb<Op, NV>(student, index, heads.begin, tiles[0], lse, log_sums);
  if (call_.in_logs && style(student) == kMean && heads.end == from.heads)
    finish_logs<NV>(student, index, log_sums);
}

// A head's tile and log-sum-exps for one block of rows.
template <typename T>
template <typename Op, int NV>
void Engine<T>::head_tile(bool student, int64_t index, int64_t h, const Tile<Op>& tile, Vec<T>* lse,
                          Scratch& scratch) {
  using Element = typename Op::Element;
  constexpr int lanes = NV * W;
  const FaSide& from = side(student);
  const Block& block = blocks_[index];
  const Sample& s = samples_[block.sample];
  const int64_t size = words<Op>(from), stride = packed_stride<T>(size);
  const bool exponentiate = keeps_exponentials(from), softmax = call_.normalize != kScores;
  const bool known = from.given_lse != nullptr;
  const T hidden = softmax ? -kInfinity<T> : T(0);
  auto* queries = reinterpret_cast<Element*>(scratch.queries.get());
  T* factors = tile.factors;
  const auto& ranges = is_kept(student, index, h) || (softmax && !known) ? s.all : s.compared;
  const auto keys = key_rows<Op>(student, block.sample, h);
  load_queries<Op>(from, block, h, queries);
  transpose(queries, stride, block.live, size, lanes,
            reinterpret_cast<Element*>(scratch.transposed.get()));

  Running<T, NV> running;
  for (int v = 0; v < NV; ++v) lse[v] = Vec<T>{};
  T values[lanes];
  const int64_t rows = (s.b * from.heads + h) * call_.rows;
  if (known) {
    gather(static_cast<const T*>(from.given_lse) + rows, block, T(0), values);
    for (int v = 0; v < NV; ++v) lse[v] = load(values + v * W);
  }
  block.each_strip(ranges, [&](int64_t strip, Range part) {
    auto* kept = tile.entries + (part.begin - block.keys.begin) * lanes;
    T* x = scores(kept, exponentiate, scratch);
    prefetch<2>(kept, part.size() * lanes);
    Vec<T> top[NV], base[NV];
    score_strip<Op, NV>(keys, student, block, part, hidden, scratch, x, top);
    if (known && exponentiate) {
      exponentials(part.size(), lse, x, kept, running.sums);
    } else if (softmax && !known) {
      running.raise(top, base);
      exponentials(part.size(), base, x, exponentiate ? kept : nullptr, running.sums);
      for (int v = 0; v < NV; ++v) store(factors + strip * lanes + v * W, running.top[v]);
    }
  });

  const auto& sums = running.sums;
  Vec<T> stored[NV];  // by which exponentials exceed what is stored of them
  for (int v = 0; v < NV; ++v) stored[v] = sums.stored[v] > 0 ? sums.exact[v] / sums.stored[v] : all<T>(T(1));
  if (exponentiate && known)
    for (int64_t i = 0; i < block.strips(); ++i)
      for (int v = 0; v < NV; ++v) store(factors + i * lanes + v * W, stored[v]);
  if (softmax && !known) {
    const T sink = from.sink ? static_cast<const T*>(from.sink)[h] / T(call_.temperature)
                             : -kInfinity<T>;
    Vec<T> m[NV], f[NV], top[NV];
    for (int v = 0; v < NV; ++v) top[v] = all<T>(sink);
    running.raise(top, m);
    for (int v = 0; v < NV; ++v) {
      const Vec<T> sum = sums.exact[v] + exp<T>(sink - m[v]);
      const Ints<T> some = sum > 0;
      lse[v] = some ? m[v] + log<T>(sum) : Vec<T>{};
      f[v] = some ? stored[v] / sum : Vec<T>{};
    }
    for (int64_t i = 0; i < block.strips(); ++i, factors += lanes)
      for (int v = 0; v < NV; ++v)
        store(factors + v * W, exp<T>(load(factors + v * W) - m[v]) * f[v]);
  }
  if (softmax) {
    for (int v = 0; v < NV; ++v) store(values + v * W, lse[v]);
    scatter(values, block, static_cast<T*>(from.lse) + rows);
  }
}

// f(first column, last, where a tile has the strip's factors): some of the block's columns, cut where the strips
// of keys end.
template <typename T>
template <typename F>
void Engine<T>::each_column_strip(const Block& block, Range columns, F f) const {
  const int32_t* key = samples_[block.sample].key_of_column.data() + block.columns.begin;
  for (int64_t c = columns.begin; c < columns.end;) {
    const int64_t first = c, strip = key[c] / kStep;
    while (c < columns.end && key[c] / kStep == strip) ++c;
    f(first, c, (strip - block.first_strip()) * block.lanes);
  }
}

// Adds some heads of a mean to the maps, some columns of them: a map's line is read and written once for all.
template <typename T>
template <typename Op, int NV>
void Engine<T>::add_exponentials(bool student, int64_t index, Range heads, const Tile<Op>* tiles,
                                 Range columns) {
  constexpr int lanes = NV * W;
  const Block& block = blocks_[index];
  const int32_t* key = samples_[block.sample].key_of_column.data() + block.columns.begin;
  const bool starts = heads.begin == 0;
  const T share = T(1) / T(side(student).heads);
  T* out = plane(student ? 0 : 1, index, 0);
  const int64_t count = heads.size();
  each_column_strip(block, columns, [&](int64_t c, int64_t end, int64_t at) {
    Vec<T> scale[kMostHeads][NV];
    for (int64_t n = 0; n < count; ++n)
      for (int v = 0; v < NV; ++v) scale[n][v] = load(tiles[n].factors + at + v * W) * share;
    for (; c < end; ++c) {
      Vec<T> sum[NV];
      for (int v = 0; v < NV; ++v) sum[v] = starts ? Vec<T>{} : load(out + c * lanes + v * W);
      const int64_t line = (key[c] - block.keys.begin) * lanes;
      for (int64_t n = 0; n < count; ++n)
        for (int v = 0; v < NV; ++v) sum[v] += load(tiles[n].entries + line + v * W) * scale[n][v];
      for (int v = 0; v < NV; ++v) store(out + c * lanes + v * W, sum[v]);
    }
  });
}

// Adds one head to the maps, whatever the specification; `sum` holds the sums beside running maxima.
template <typename T>
template <typename Op, int NV>
void Engine<T>::absorb(bool student, int64_t index, int64_t head, const Tile<Op>& tile, const Vec<T>* lse,
                       T* sum) {
  constexpr int lanes = NV * W;
  const Block& block = blocks_[index];
  const FaSide& from = side(student);
  const int32_t* key = samples_[block.sample].key_of_column.data();
  const int64_t how = style(student), first = block.columns.begin, columns = block.columns.size();
  const bool starts = head == head_range(from, student, chunk_).begin;
  auto line = [&](int64_t c) { return tile.entries + (key[first + c] - block.keys.begin) * lanes; };
  T* out = plane(student ? 0 : 1, index, how == kEach ? head - chunk_.groups.begin : 0);

  if (call_.in_logs) {
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
  const bool exponentiated = keeps_exponentials(from), softmax = call_.normalize != kScores;
  auto add = [&](auto value) {
    each_column_strip(block, {0, columns}, [&](int64_t c, int64_t end, int64_t at) {
      Vec<T> scale[NV];
      for (int v = 0; v < NV; ++v)
        scale[v] = exponentiated ? load(tile.factors + at + v * W) * share : all<T>(share);
      for (; c < end; ++c)
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
    });
  };
  if (exponentiated || !softmax) add([](Vec<T> x, int) { return x; });
  else add([&](Vec<T> x, int v) { return exp<T>(x - lse[v]); });
}

// log A = top + log sum - log H; -inf where hidden.
template <typename T>
template <int NV>
void Engine<T>::finish_logs(bool student, int64_t index, const T* sum) {
  const Block& block = blocks_[index];
  const T log_heads = std::log(T(side(student).heads));
  T* top = plane(student ? 0 : 1, index, 0);
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
