// The entry points: choose the instruction set of this machine, turn exceptions into messages.
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <string>

#include "align.h"

namespace {

thread_local std::string message;

template <typename F> int64_t guarded(F f) {
  try {
    f();
    return 0;
  } catch (const std::bad_alloc&) {
    message = "not enough memory for the workspace";
  } catch (const std::exception& error) {
    message = error.what();
  }
  return 1;
}

using Open = fastalign::Session* (*)(const FaCall&);
struct Isa {
  const char* name;
  Open narrow, wide;  // float, double
  void (*scale)(const float*, int64_t, float, uint16_t*, int64_t);
};

#define FASTALIGN_ISA_OF(isa)                                                                    \
  Isa {                                                                                          \
    #isa, fastalign::isa::open<float>, fastalign::isa::open<double>, fastalign::isa::scale<float> \
  }

// The widest set that this machine has; the environment variable FASTALIGN_ISA names a narrower one.
Isa choose() {
  const char* wanted = std::getenv("FASTALIGN_ISA");
  [[maybe_unused]] auto allowed = [&](const char* name) {
    return !wanted || !std::strcmp(wanted, name);
  };
#ifdef FASTALIGN_NATIVE
  return FASTALIGN_ISA_OF(native);
#endif
#ifdef FASTALIGN_AVX512_BF16
  if (allowed("avx512_bf16") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512bf16"))
    return FASTALIGN_ISA_OF(avx512_bf16);
#endif
#ifdef FASTALIGN_AVX512
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    return FASTALIGN_ISA_OF(avx512);
#endif
#ifdef FASTALIGN_AVX2
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return FASTALIGN_ISA_OF(avx2);
#endif
#ifdef FASTALIGN_GENERIC
  return FASTALIGN_ISA_OF(generic);
#endif
}

const Isa& isa() {
  static const Isa chosen = choose();
  return chosen;
}

fastalign::Session& as_session(void* session) { return *static_cast<fastalign::Session*>(session); }

}  // namespace

int64_t fa_abi() { return FASTALIGN_ABI; }
int64_t fa_call_size() { return sizeof(FaCall); }
const char* fa_digest() { return "fastalign:" FASTALIGN_DIGEST; }
const char* fa_isa() { return isa().name; }
const char* fa_error() { return message.c_str(); }

int64_t fa_open(const FaCall* call, void** session, int64_t* chunks) {
  return guarded([&] {
    std::unique_ptr<fastalign::Session> opened((call->wide ? isa().wide : isa().narrow)(*call));
    *chunks = opened->chunks();
    *session = opened.release();
  });
}
int64_t fa_maps(void* session, int64_t chunk) {
  return guarded([&] { as_session(session).maps(chunk); });
}
int64_t fa_statistics(void* session, int64_t chunk, const void* thresholds) {
  return guarded([&] { as_session(session).statistics(chunk, thresholds); });
}
int64_t fa_pool(void* session, int64_t chunk, const void* thresholds) {
  return guarded([&] { as_session(session).pool(chunk, thresholds); });
}
int64_t fa_gradients(void* session, int64_t chunk, const void* thresholds, const FaCoefficients* c) {
  return guarded([&] { as_session(session).gradients(chunk, thresholds, *c); });
}
int64_t fa_scale(const float* in, int64_t count, double factor, void* out, int64_t threads) {
  return guarded([&] {
    isa().scale(in, count, static_cast<float>(factor), static_cast<uint16_t*>(out), threads);
  });
}
void fa_close(void* session) { delete static_cast<fastalign::Session*>(session); }
