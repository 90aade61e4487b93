// Detection of the instruction set, once at load time; tests may choose a lesser one.
#include "api.h"
#include "dispatch.h"

#include <atomic>
#include <initializer_list>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace wkv {
namespace {

bool supported(Isa isa) {
  if (isa == Isa::portable) return true;
#if defined(WKV_HAVE_AVX2)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512) return avx512;
  if (isa == Isa::avx512vnni) return avx512 && __builtin_cpu_supports("avx512vnni");
#elif defined(WKV_HAVE_NEONDOT)
  if (isa == Isa::neondot) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & (1UL << 20)) != 0;  // HWCAP_ASIMDDP
#else
    return true;  // every Apple and Windows arm64 processor has it
#endif
  }
#endif
  return false;
}

Isa best() {
  for (Isa isa : {Isa::avx512vnni, Isa::avx512, Isa::avx2, Isa::neondot})
    if (supported(isa)) return isa;
  return Isa::portable;
}

std::atomic<Isa> current{best()};

}  // namespace

Isa active_isa() { return current.load(std::memory_order_relaxed); }

}  // namespace wkv

WKV_API int64_t wkv_abi_version() { return WKV_ABI_VERSION; }

WKV_API int64_t wkv_instruction_set() { return static_cast<int64_t>(wkv::active_isa()); }

// Returns 0, or -1 where this build or processor does not have it.
WKV_API int64_t wkv_use_instruction_set(int64_t isa) {
  const auto wanted = static_cast<wkv::Isa>(isa);
  if (!wkv::supported(wanted)) return -1;
  wkv::current.store(wanted);
  return 0;
}
