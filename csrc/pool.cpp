// Fresh pages cost a fault and a zeroing each, a tenth of a call in all, and the C library returns large
// blocks to the system every time. So up to kKept bytes stay here between calls, by exact size.
#include "align.h"
#include "pool.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastalign {
namespace {

#ifdef FASTALIGN_NO_POOL  // so that AddressSanitizer sees every block begin and end
constexpr int64_t kKept = 0;
#else
constexpr int64_t kKept = int64_t(64) << 20;
#endif
constexpr int64_t kHuge = int64_t(2) << 20;

struct Block {
  void* memory;
  int64_t bytes;
};

struct Pool {
  std::mutex lock;
  std::vector<Block> free;  // oldest first
  int64_t held = 0, used = 0, peak = 0;  // bytes kept, handed out, and the most of both together
  ~Pool() {
    for (const Block& block : free) std::free(block.memory);
  }
};

Pool& pool() {
  static Pool instance;
  return instance;
}

bool poison = false;

int64_t rounded(int64_t bytes) {
  const int64_t unit = bytes < kHuge ? kLine : kHuge;
  return std::max(unit, (bytes + unit - 1) / unit * unit);
}

}  // namespace

void* acquire(int64_t bytes) {
  bytes = rounded(bytes);
  void* memory = nullptr;
  {
    Pool& p = pool();
    const std::lock_guard<std::mutex> guard(p.lock);
    p.used += bytes;
    const auto found = std::find_if(p.free.begin(), p.free.end(),
                                    [&](const Block& block) { return block.bytes == bytes; });
    if (found != p.free.end()) {
      memory = found->memory;
      p.held -= found->bytes;
      p.free.erase(found);
    }
    p.peak = std::max(p.peak, p.used + p.held);
  }
  if (!memory) {
    memory = std::aligned_alloc(static_cast<size_t>(bytes < kHuge ? kLine : kHuge),
                                static_cast<size_t>(bytes));
    if (!memory) throw std::bad_alloc();
    prefer_large_pages(memory, bytes);
  }
  if (poison) std::memset(memory, 0xff, static_cast<size_t>(bytes));
  return memory;
}

void give_back(void* memory, int64_t bytes) {
  bytes = rounded(bytes);
  Pool& p = pool();
  const std::lock_guard<std::mutex> guard(p.lock);
  p.free.push_back({memory, bytes});
  p.used -= bytes;
  p.held += bytes;
  while (p.held > kKept) {
    std::free(p.free.front().memory);
    p.held -= p.free.front().bytes;
    p.free.erase(p.free.begin());
  }
}

void prefer_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  const auto begin = reinterpret_cast<uintptr_t>(memory), unit = static_cast<uintptr_t>(kHuge);
  const uintptr_t first = (begin + unit - 1) / unit * unit, end = (begin + bytes) / unit * unit;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fastalign

int64_t fa_peak_bytes() {
  fastalign::Pool& p = fastalign::pool();
  const std::lock_guard<std::mutex> guard(p.lock);
  const int64_t peak = p.peak;
  for (const fastalign::Block& block : p.free) std::free(block.memory);
  p.free.clear();
  p.held = 0;
  p.peak = p.used;
  return peak;
}

void fa_poison(int64_t on) { fastalign::poison = on != 0; }
