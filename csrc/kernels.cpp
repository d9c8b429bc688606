// The kernels for one instruction set and one real type: built once for each pair, with FASTALIGN_ISA, REAL
// and the flags to match.
#include <cmath>

#include "gradients.h"
#include "maps.h"
#include "statistics.h"

namespace fastalign::FASTALIGN_ISA {

template <> Session* open<REAL>(const FaCall& call) { return new Engine<REAL>(call); }

template <>
void scale<REAL>(const REAL* in, int64_t count, REAL factor, uint16_t* out, int64_t threads) {
  constexpr int64_t part = 1 << 16;
  parallel((count + part - 1) / part, threads, [](int64_t) { return 1; }, [=](int64_t item, int64_t) {
    const REAL* from = in + item * part;
    uint16_t* to = out + item * part;
    const int64_t end = std::min(part, count - item * part);
    // a plain loop, which the compiler turns into vectors of this instruction set
    for (int64_t i = 0; i < end; ++i) to[i] = narrow(static_cast<float>(from[i] * factor));
  });
}

}  // namespace fastalign::FASTALIGN_ISA
