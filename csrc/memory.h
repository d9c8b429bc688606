// Buffers aligned to a cache line, uninitialised, and the threads that fill them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#ifdef FASTALIGN_STD_THREADS  // ThreadSanitizer does not know OpenMP's barriers
#include <thread>
#elif defined(_OPENMP)
#include <omp.h>
#endif

#include "pool.h"
#include "vec.h"

namespace fastalign::FASTALIGN_ISA {


inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <typename T> class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() { release(); }

  // At least `size` elements; what was there is gone if it has to grow.
  void reset(int64_t size) {
    if (size <= size_) return;
    release();
    data_ = static_cast<T*>(acquire(size * int64_t(sizeof(T))));
    size_ = size;
  }
  void release() {
    if (data_) give_back(data_, bytes());
    data_ = nullptr;
    size_ = 0;
  }
  int64_t bytes() const { return size_ * int64_t(sizeof(T)); }
  T* get() { return data_; }
  const T* get() const { return data_; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// Runs body(item, thread) for every item. Items are dealt to the threads by cost before the start, the
// most expensive first, each to the thread with the least work so far. Every item writes to places of
// its own, so that the deal does not change a bit of the result.
template <typename Cost, typename Body>
void parallel(int64_t items, int64_t threads, Cost cost, Body body) {
  threads = std::max<int64_t>(1, std::min(threads, items));
  if (threads == 1) {
    for (int64_t item = 0; item < items; ++item) body(item, int64_t(0));
    return;
  }
  std::vector<int64_t> order(items), load(threads);
  for (int64_t item = 0; item < items; ++item) order[item] = item;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost(a) > cost(b); });
  std::vector<std::vector<int64_t>> hands(threads);
  for (const int64_t item : order) {
    const auto least = std::min_element(load.begin(), load.end()) - load.begin();
    load[least] += cost(item) + 1;
    hands[least].push_back(item);
  }
  auto play = [&](int64_t thread) {
    for (const int64_t item : hands[thread]) body(item, thread);
  };
#ifdef FASTALIGN_STD_THREADS
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t) others.emplace_back(play, t);
  play(0);
  for (auto& other : others) other.join();
#elif defined(_OPENMP)
  // Torch's own pool: both libraries load the same libgomp.
#pragma omp parallel num_threads(static_cast<int>(threads))
  for (int64_t t = omp_get_thread_num(); t < threads; t += omp_get_num_threads()) play(t);
#else
  for (int64_t t = 0; t < threads; ++t) play(t);
#endif
}

}  // namespace fastalign::FASTALIGN_ISA
