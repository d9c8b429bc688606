// The C interface between fastalign/backends/cpu.py and the kernels: plain data, no torch.
//
// The library neither includes nor links torch. It cannot break when torch changes, it compiles in
// seconds, and AddressSanitizer and ThreadSanitizer see all of it. Python mirrors these structs with
// ctypes; both sides compare FASTALIGN_ABI and the size of the struct before the first call.
//
// A call is a session (fa_open ... fa_close) of three phases over *chunks* of row blocks:
//
//     fa_maps                  queries and keys -> log-sum-exps, compared maps, and of these what needs no
//                              threshold: the rows' moments (sink filter) or statistics (no filter)
//     fa_statistics, fa_pool   filtered maps -> statistics of rows; maps -> sums over rows
//     fa_gradients             maps and coefficients -> dq, dk, dmix, and what the sinks need
//
// Between the phases Python turns the numbers into the loss, the thresholds of the sink filter and the
// coefficients of the gradient, with the functions that every backend shares.
#pragma once

#include <cstdint>

#define FASTALIGN_ABI 3

extern "C" {

enum FaDtype { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };
enum FaHeads { kMean = 0, kEach = 1, kMix = 2 };
enum FaNormalize { kJoint = 0, kVisual = 1, kVisualPerHead = 2, kScores = 3 };
enum FaDivergence { kCosine = 0, kKl = 1, kReverseKl = 2, kJs = 3, kMse = 4 };
enum FaWanted { kWantQ = 1, kWantK = 2, kWantMix = 4, kWantSink = 8 };

// A strided input of four dimensions.
struct FaTensor {
  const void* data;
  int64_t stride[4];
  int64_t dtype;
};

// One model's half. `real` below is float or double, as FaCall.wide says.
struct FaSide {
  FaTensor q, k;                    // [B, heads, R, size], [B, key_heads, L, size]
  int64_t heads, key_heads, size;   // heads == 0: no teacher, a given target
  double scale, softcap;
  const void* given_lse;            // real [B, heads, R] or null
  const void* sink;                 // real [heads] or null
  void* lse;                        // real [B, heads, R], written
};

struct FaCall {
  FaSide student, teacher;
  int64_t batch, length, rows, groups;
  const int64_t* positions;     // [B, R], -1: not a row
  const uint8_t* columns;       // [B, L]
  const int32_t* segments;      // [B, L]
  const int32_t* blocks;        // [B, L] or null
  const void* weight;           // real [B, R]
  const void* mix;              // real [heads, G] or null
  const void* target;           // real [B, G, target_rows, target_width] or null
  const int64_t* target_index;  // likewise, or null
  int64_t target_rows, target_width;
  double temperature;
  int64_t window;
  int64_t causal, wide, heads, normalize, divergence, pooled, in_logs, sink_filter;
  int64_t wanted;               // FaWanted bits: which gradients will be asked for
  int64_t local;                // whether a chunk's gradient needs nothing of other chunks
  int64_t threads, budget;      // bytes of the workspace that is independent of the inputs' size
  void* statistics;             // real [n, B, G, R]
  void* entries;                // real [B, R]
  void* pool;                   // real [5, B, G, L]
  void* moments;                // real [2 sides, 2, B, G, R]
  void* d_q;                    // real [B, heads, R, size], written
  void* d_k;                    // real [B, key_heads, L, size], written
  void* d_mix;                  // real [heads, G], added to
  void* delta;                  // real [B, heads, R], sum_V X of each row, added to; null: not kWantSink
};

// What fa_gradients needs beside the maps; real, null where it does not apply.
struct FaCoefficients {
  const void* rows;        // [n, B, G, R]
  const void* pooled;      // [B, G, L]: by the pooled vector (or its logarithm), over the column's count
  const void* pooled_log;  // [B, G, L]
};

int64_t fa_abi();
int64_t fa_call_size();
const char* fa_digest();  // of the sources and flags that this library is made of
const char* fa_isa();  // of the kernels that this machine runs: "avx512_bf16", "avx512", "avx2", ...

// Each returns 0, or 1 with a message for fa_error (one per thread).
const char* fa_error();
int64_t fa_open(const FaCall* call, void** session, int64_t* chunks);
int64_t fa_maps(void* session, int64_t chunk);
int64_t fa_statistics(void* session, int64_t chunk, const void* thresholds);  // real [2, B, G] or null
int64_t fa_pool(void* session, int64_t chunk, const void* thresholds);
int64_t fa_gradients(void* session, int64_t chunk, const void* thresholds, const FaCoefficients* c);
void fa_close(void* session);
// out[i] = bfloat16(factor in[i]).
int64_t fa_scale(const float* in, int64_t count, double factor, void* out, int64_t threads);
// The most bytes of workspace at once since the last call of this, which also lets go what is kept.
int64_t fa_peak_bytes();
void fa_poison(int64_t on);  // for tests: fill every buffer with NaN, so that what is not written shows
}

namespace fastalign {

// One session, for one instruction set and one real type.
struct Session {
  virtual ~Session() = default;
  virtual int64_t chunks() const = 0;
  virtual void maps(int64_t chunk) = 0;
  virtual void statistics(int64_t chunk, const void* thresholds) = 0;
  virtual void pool(int64_t chunk, const void* thresholds) = 0;
  virtual void gradients(int64_t chunk, const void* thresholds, const FaCoefficients& c) = 0;
};

// Engine<Real> of each instruction set, and what fa_scale calls, defined in kernels.cpp.
#define FASTALIGN_KERNELS(isa)                                                                \
  namespace isa {                                                                             \
  template <typename Real> Session* open(const FaCall& call);                                 \
  template <typename Real>                                                                    \
  void scale(const Real* in, int64_t count, Real factor, uint16_t* out, int64_t threads);     \
  }
FASTALIGN_KERNELS(generic)
FASTALIGN_KERNELS(avx2)
FASTALIGN_KERNELS(avx512)
FASTALIGN_KERNELS(avx512_bf16)
FASTALIGN_KERNELS(native)
#undef FASTALIGN_KERNELS

}  // namespace fastalign
