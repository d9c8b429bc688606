// Which rows, which keys, who sees whom: fastalign/select.py for blocks of rows.
//
// The rows of a sample, ordered by position, are cut into blocks of up to three vectors of lanes; a lane
// is a row. A block knows the range of keys that any of its rows can see (what lies outside is never
// touched: tiles above the causal diagonal, outside a window, in another segment) and, for each key of
// the range, one bit a lane.
#pragma once

#include <numeric>
#include <unordered_map>

#include "align.h"
#include "gemm.h"
#include "memory.h"

namespace fastalign::FASTALIGN_ISA {

// Ranges of keys start and end at multiples of this, a whole tile of the dk product.
constexpr int64_t kGranule = kTileRows<2>;

// Keys per strip of a tile, whole tiles of any width: a strip of scores and the keys that it multiplies stay in
// the nearest caches.
constexpr int64_t kWhole = std::lcm(kTileRows<2>, kTileRows<3>);
constexpr int64_t kStep = std::max<int64_t>(1, 96 / kWhole) * kWhole;

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
  Range clip(Range other) const {
    return {std::max(begin, other.begin), std::min(end, other.end)};
  }
};

struct Sample {
  int64_t b = 0;
  std::vector<int32_t> row, position, ordinal;  // by position; index into q, place in the sequence
  std::vector<int32_t> low, high;               // key range of each row, positions
  std::vector<int32_t> key;                     // position of each key of the sweep
  std::vector<int32_t> column_of_key;           // ordinal of the compared column, -1: none
  std::vector<int32_t> key_of_column;           // index into key
  std::vector<Range> all, compared;             // ranges of keys: every one, those with columns
  bool consecutive = false;                     // whether the keys follow each other in the sequence
};

struct Block {
  int64_t sample, first, live, lanes;  // rows [first, first + live) of the sample; lanes >= live
  Range keys, columns;
  int64_t masks;  // where the chunk's masks of this block begin
  int64_t width() const { return keys.size(); }
  int64_t first_strip() const { return keys.begin / kStep; }
  int64_t strips() const { return (keys.end + kStep - 1) / kStep - first_strip(); }
  // Reals that one head's attention takes, whose entries are 1 / `per` real each: [keys, lanes], then a
  // factor for each strip, [strips, lanes].
  int64_t tile(int64_t per = 1) const { return (width() / per + strips()) * lanes; }

  // f(strip's number in the block, its keys) for every part of a strip that lies in one of the ranges.
  template <typename F> void each_strip(const std::vector<Range>& ranges, F f) const {
    for (const Range& range : ranges) {
      const Range part = range.clip(keys);
      for (int64_t from = part.begin; from < part.end;) {
        const int64_t strip = from / kStep, to = std::min(part.end, (strip + 1) * kStep);
        f(strip - first_strip(), Range{from, to});
        from = to;
      }
    }
  }
};

// Who sees whom (select.Visibility), for one sample.
class Visibility {
 public:
  Visibility(const FaCall& call, int64_t b)
      : segments_(call.segments + b * call.length),
        blocks_(call.blocks ? call.blocks + b * call.length : nullptr),
        length_(static_cast<int32_t>(call.length)),
        causal_(call.causal != 0),
        window_(static_cast<int32_t>(std::min<int64_t>(call.window, INT32_MAX / 2))) {
    spans(segments_, segment_span_);
    if (blocks_) spans(blocks_, block_span_);
  }

  // The positions [low, high) outside which row i sees nothing.
  std::pair<int32_t, int32_t> range(int32_t i) const {
    int32_t low = window_ ? std::max(0, i - window_ + 1) : 0;
    int32_t high = causal_ ? i + 1 : window_ ? std::min(length_, i + window_) : length_;
    if (blocks_ && blocks_[i] >= 0) {
      const auto span = block_span_.at(blocks_[i]);
      low = std::min(low, span.first);
      high = std::max(high, span.second);
    }
    const auto span = segment_span_.at(segments_[i]);
    return {std::max(low, span.first), std::min(high, span.second)};
  }

  // One bit a lane: whether the row at positions[lane] sees key j. Lanes beyond `live` see every key.
  uint64_t bits(const int32_t* positions, int64_t live, int32_t j) const {
    uint64_t seen = ~uint64_t(0);
    for (int64_t lane = 0; lane < live; ++lane) {
      const int32_t i = positions[lane];
      bool near = !causal_ || j <= i;
      if (window_) near = near && std::abs(i - j) < window_;
      if (blocks_) near = near || (blocks_[i] >= 0 && blocks_[i] == blocks_[j]);
      const bool sees = near && segments_[j] >= 0 && segments_[i] == segments_[j];
      seen ^= uint64_t(!sees) << lane;
    }
    return seen;
  }

  // Whether all rows of a segment between the positions `first` and `last` see all of these keys, from the
  // extremes alone: most tiles of a causal map need no look at single entries.
  bool plain(int32_t first, int32_t last, int32_t segment, int32_t j) const {
    return segments_[j] == segment && segment >= 0 && (!causal_ || j <= first) &&
           (!window_ || (last - j < window_ && j - first < window_));
  }
  int32_t segment(int32_t i) const { return segments_[i]; }

 private:
  using Spans = std::unordered_map<int32_t, std::pair<int32_t, int32_t>>;

  void spans(const int32_t* ids, Spans& out) const {
    std::pair<int32_t, int32_t>* span = nullptr;
    for (int32_t j = 0; j < length_; ++j) {
      if (!span || ids[j] != ids[j - 1]) span = &out.try_emplace(ids[j], j, j).first->second;
      span->second = j + 1;
    }
  }

  const int32_t *segments_, *blocks_;
  int32_t length_;
  bool causal_;
  int32_t window_;
  Spans segment_span_, block_span_;
};

inline Sample select_sample(const FaCall& call, int64_t b, const Visibility& visibility) {
  Sample s;
  s.b = b;
  const int64_t* positions = call.positions + b * call.rows;
  const uint8_t* columns = call.columns + b * call.length;
  for (int64_t r = 0; r < call.rows; ++r)
    if (positions[r] >= 0) s.row.push_back(static_cast<int32_t>(r));
  std::vector<int32_t> order(s.row.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int32_t x, int32_t y) {
    return positions[s.row[x]] < positions[s.row[y]];
  });
  const std::vector<int32_t> given = s.row;
  for (size_t i = 0; i < order.size(); ++i) {
    s.row[i] = given[order[i]];
    s.position.push_back(static_cast<int32_t>(positions[s.row[i]]));
    s.ordinal.push_back(order[i]);
    const auto [low, high] = visibility.range(s.position.back());
    s.low.push_back(low);
    s.high.push_back(high);
  }

  const bool every = call.normalize == kJoint || call.normalize == kVisual;
  for (int64_t j = 0; j < call.length; ++j) {
    if (!every && !columns[j]) continue;
    if (columns[j]) {
      s.column_of_key.push_back(static_cast<int32_t>(s.key_of_column.size()));
      s.key_of_column.push_back(static_cast<int32_t>(s.key.size()));
    } else {
      s.column_of_key.push_back(-1);
    }
    s.key.push_back(static_cast<int32_t>(j));
  }
  s.consecutive = !s.key.empty() && s.key.back() - s.key.front() + 1 == static_cast<int32_t>(s.key.size());
  const int64_t padded = round_up(static_cast<int64_t>(s.key.size()), kGranule);
  s.column_of_key.resize(padded, -1);
  s.all = {{0, padded}};
  for (const int32_t k : s.key_of_column) {
    const int64_t at = k / kGranule * kGranule;
    if (s.compared.empty() || s.compared.back().end < at) s.compared.push_back({at, at});
    s.compared.back().end = at + kGranule;
  }
  return s;
}

// The blocks of a sample; rows that see no compared column together are left out.
inline void cut_blocks(const Sample& s, int64_t sample, int64_t width, int64_t vectors,
                       std::vector<Block>& out) {
  const auto rows = static_cast<int64_t>(s.row.size());
  auto at = [](const std::vector<int32_t>& sorted, int64_t value) {
    return std::lower_bound(sorted.begin(), sorted.end(), value) - sorted.begin();
  };
  // As few blocks as can be, of equal numbers of vectors but for one: narrow blocks multiply slowly.
  const int64_t total = round_up(rows, width) / width;
  const int64_t count = round_up(total, vectors) / vectors;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t first = n * total / count * width, next = (n + 1) * total / count * width;
    Block block{};
    block.sample = sample;
    block.first = first;
    block.live = std::min(next, rows) - first;
    block.lanes = round_up(block.live, width);
    const auto low = *std::min_element(&s.low[first], &s.low[first] + block.live);
    const auto high = *std::max_element(&s.high[first], &s.high[first] + block.live);
    const int64_t begin = at(s.key, low), end = at(s.key, high);
    block.keys = {begin / kGranule * kGranule, round_up(end, kGranule)};
    block.columns = {at(s.key_of_column, begin), at(s.key_of_column, end)};
    if (block.columns.size() > 0) out.push_back(block);
  }
}

}  // namespace fastalign::FASTALIGN_ISA
