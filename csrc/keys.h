// Where the products find queries and keys: in the inputs themselves, or packed.
#pragma once

#include "engine.h"

namespace fastalign::FASTALIGN_ISA {

// Whether a sample's keys can be read where they are: in the product's own format, rows whole and not so
// far apart that they fall into few cache sets.
template <typename T>
template <typename Op>
bool Engine<T>::in_place(const FaSide& from, const Sample& s) const {
  constexpr int64_t farthest = 1024;  // bytes
  const FaTensor& k = from.k;
  const int64_t size = Op::pairs ? 2 : sizeof(T);
  const bool same = k.dtype == (Op::pairs ? kBFloat16 : sizeof(T) == 8 ? kFloat64 : kFloat32);
  if (!same || k.stride[3] != 1 || k.stride[2] * size > farthest || !s.consecutive) return false;
  const auto address = reinterpret_cast<uintptr_t>(k.data);
  return !Op::pairs || (k.stride[0] | k.stride[1] | k.stride[2] | int64_t(address / 2)) % 2 == 0;
}

// Makes room of `reals` a key for the chunk's samples that are `missing(sample)`, calls pack(sample, head,
// keys) for parts of them, and lets go what other samples hold. Returns the bytes held.
template <typename T>
template <typename Missing, typename Pack>
int64_t Engine<T>::pack(const FaSide& from, Packed& to, int64_t reals, Missing missing, Pack pack) {
  const int64_t low = blocks_[chunk_.blocks.begin].sample;
  const int64_t high = blocks_[chunk_.blocks.end - 1].sample, part = 256;
  struct Item { int64_t sample, head; Range keys; };
  std::vector<Item> items;
  int64_t held = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(samples_.size()); ++i) {
    if (i < low || i > high) to[i].release();
    else if (to[i].bytes() == 0 && missing(samples_[i])) {
      const int64_t keys = samples_[i].all[0].end;
      to[i].reset(from.key_heads * keys * reals);
      for (int64_t h = 0; h < from.key_heads; ++h)
        for (int64_t k = 0; k < keys; k += part) items.push_back({i, h, {k, std::min(keys, k + part)}});
    }
    held += to[i].bytes();
  }
  parallel(static_cast<int64_t>(items.size()), call_.threads, [](int64_t) { return 1; },
           [&](int64_t i, int64_t) { pack(items[i].sample, items[i].head, items[i].keys); });
  return held;
}

// Packs the keys of a side that are not read in place. Returns the bytes held.
template <typename T> int64_t Engine<T>::pack_keys(bool student) {
  const FaSide& from = side(student);
  Packed& to = keys_[student ? 0 : 1];
  int64_t held = 0;
  with_product(from, [&](auto op) {
    using Op = decltype(op);
    const int64_t size = words<Op>(from), stride = packed_stride<T>(size);
    auto missing = [&](const Sample& s) { return !in_place<Op>(from, s); };
    held = pack(from, to, stride, missing, [&](int64_t sample, int64_t head, Range keys) {
      const Sample& s = samples_[sample];
      T* out = to[sample].get() + (head * s.all[0].end + keys.begin) * stride;
      for (int64_t k = keys.begin; k < keys.end; ++k, out += stride) {
        if (k >= static_cast<int64_t>(s.key.size())) std::fill_n(out, stride, T(0));
        else if constexpr (Op::pairs)
          read_pairs(from.k, s.b, head, s.key[k], size, stride, reinterpret_cast<BFloat16Pair*>(out));
        else read_row<T>(from.k, s.b, head, s.key[k], size, stride, T(1), out);
      }
    });
  });
  return held;
}

// The student's keys as pairs of neighbouring keys, [key_heads, keys / 2, stride].
template <typename T> void Engine<T>::pack_key_pairs() {
  if (!(call_.wanted & kWantQ)) return;
  with_product(call_.student, [&](auto op) {
    using Op = decltype(op);
    if constexpr (Op::pairs) {
      const FaSide& from = call_.student;
      const int64_t size = words<Op>(from), stride = packed_stride<T>(from.size);
      auto missing = [](const Sample&) { return true; };
      pack(from, key_pairs_, stride / 2, missing, [&](int64_t sample, int64_t head, Range keys) {
        const Sample& s = samples_[sample];
        auto* out = reinterpret_cast<BFloat16Pair*>(key_pairs_[sample].get()) +
                    (head * s.all[0].end + keys.begin) / 2 * stride;
        const auto end = static_cast<int64_t>(s.key.size());
        const bool as_given = in_place<Op>(from, s);
        const auto given = key_rows<Op>(true, sample, head * (from.heads / from.key_heads));
        std::vector<BFloat16Pair> row[2];
        for (int64_t k = keys.begin; k < keys.end; k += 2, out += stride) {
          if (as_given && k + 1 < end) {
            const BFloat16Pair* first = given.first + k * given.stride;
            interleave(first, first + given.stride, size, out);
            continue;
          }
          for (int64_t n = 0; n < 2; ++n) {
            row[n].assign(size, {0});
            if (k + n < end) read_pairs(from.k, s.b, head, s.key[k + n], size, size, row[n].data());
          }
          interleave(row[0].data(), row[1].data(), size, out);
        }
      });
    }
  });
}

template <typename T>
template <typename Op>
Rows<typename Op::Element> Engine<T>::key_rows(bool student, int64_t sample, int64_t head) const {
  using Element = typename Op::Element;
  const FaSide& from = side(student);
  const Sample& s = samples_[sample];
  const int64_t key_head = head / (from.heads / from.key_heads);
  const Buffer<T>& packed = keys_[student ? 0 : 1][sample];
  if (packed.bytes() == 0) {
    const int64_t per = Op::pairs ? 2 : 1;
    const int64_t at = s.b * from.k.stride[0] + key_head * from.k.stride[1] + s.key[0] * from.k.stride[2];
    return {static_cast<const Element*>(from.k.data) + at / per, from.k.stride[2] / per};
  }
  const int64_t stride = packed_stride<T>(words<Op>(from));
  return {reinterpret_cast<const Element*>(packed.get()) + key_head * s.all[0].end * stride, stride};
}

// The student's keys as the left operand of dq^T = K^T dS^T: row k is key k, or keys 2 k and 2 k + 1.
template <typename T>
template <typename Op>
Rows<typename Op::Element> Engine<T>::transposed_keys(int64_t sample, int64_t head) const {
  if constexpr (!Op::pairs) {
    return key_rows<Op>(true, sample, head);
  } else {
    const FaSide& from = call_.student;
    const int64_t key_head = head / (from.heads / from.key_heads), stride = packed_stride<T>(from.size);
    return {reinterpret_cast<const typename Op::Element*>(key_pairs_[sample].get()) +
                key_head * samples_[sample].all[0].end / 2 * stride, stride};
  }
}

// Queries of a block as rows, [lanes, packed stride]; reals are scaled, lanes without a row are 0.
template <typename T>
template <typename Op>
void Engine<T>::load_queries(const FaSide& from, const Block& block, int64_t head,
                             typename Op::Element* rows) {
  const Sample& s = samples_[block.sample];
  const int64_t size = words<Op>(from), stride = packed_stride<T>(size);
  for (int64_t i = 0; i < block.lanes; ++i, rows += stride) {
    if (i >= block.live) {
      std::fill_n(rows, stride, typename Op::Element{});
      continue;
    }
    const int64_t row = s.row[block.first + i];
    if constexpr (Op::pairs) read_pairs(from.q, s.b, head, row, size, stride, rows);
    else read_row<T>(from.q, s.b, head, row, size, stride, query_factor(from), rows);
  }
}

// The rows as the right operand of dk = dS^T Q: as they are, or as pairs of neighbouring rows.
template <typename T>
template <typename Op>
void Engine<T>::pack_queries(const Block& block, const typename Op::Element* rows,
                             typename Op::Element* out) {
  const FaSide& from = call_.student;
  const int64_t stride = packed_stride<T>(words<Op>(from)), wide = packed_stride<T>(from.size);
  if constexpr (!Op::pairs) {
    std::copy_n(rows, block.lanes * stride, out);
  } else {
    for (int64_t i = 0; i < block.lanes; i += 2, out += wide) {
      interleave(rows + i * stride, rows + (i + 1) * stride, words<Op>(from), out);
      std::fill(out + from.size, out + wide, BFloat16Pair{0});
    }
  }
}

}  // namespace fastalign::FASTALIGN_ISA
