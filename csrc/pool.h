// Workspace that outlives a call: large pages, kept for the next one.
#pragma once

#include <cstdint>

namespace fastalign {

constexpr int64_t kLine = 64;  // bytes of a cache line, the alignment of everything

// Memory for at least `bytes`, uninitialised. Throws std::bad_alloc.
void* acquire(int64_t bytes);

// `bytes` as in acquire().
void give_back(void* memory, int64_t bytes);

// Asks for large pages where memory of somebody else is about to be written for the first time.
void prefer_large_pages(void* memory, int64_t bytes);

}  // namespace fastalign
