// The kernels for one instruction set and one real type: built once for each pair, with FASTALIGN_ISA, REAL
// and the flags to match.
#include <cmath>

#include "gradients.h"
#include "maps.h"
#include "statistics.h"

namespace fastalign::FASTALIGN_ISA {

template <> Session* open<REAL>(const FaCall& call) { return new Engine<REAL>(call); }

}  // namespace fastalign::FASTALIGN_ISA
