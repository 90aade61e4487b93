// Which instruction set runs, and functions that exist once per instruction set.
#pragma once
#include <cstdint>

namespace wkv {

enum class Isa : int32_t { portable = 0, avx2 = 1, avx512 = 2, avx512vnni = 3, neondot = 4 };

Isa active_isa();

}  // namespace wkv

// WKV_EACH_ISA(M) expands M(name) for every instruction set of this build but `portable`.
#if defined(WKV_HAVE_AVX2)
#define WKV_EACH_ISA(M) M(avx2) M(avx512) M(avx512vnni)
#elif defined(WKV_HAVE_NEONDOT)
#define WKV_EACH_ISA(M) M(neondot)
#else
#define WKV_EACH_ISA(M)
#endif

// WKV_DISPATCH(function, (int n, float* x), (n, x)) declares wkv::<isa>::function for every instruction set and
// defines wkv::function, which calls the active one. For use in src/*.cpp only. Everything returns void.
#define WKV_DISPATCH_DECLARE(isa, function, parameters) \
  namespace isa {                                       \
  void function parameters;                             \
  }
#if defined(WKV_HAVE_AVX2)
#define WKV_DISPATCH(function, parameters, arguments)                   \
  namespace wkv {                                                       \
  WKV_DISPATCH_DECLARE(portable, function, parameters)                  \
  WKV_DISPATCH_DECLARE(avx2, function, parameters)                      \
  WKV_DISPATCH_DECLARE(avx512, function, parameters)                    \
  WKV_DISPATCH_DECLARE(avx512vnni, function, parameters)                \
  inline void function parameters {                                     \
    switch (active_isa()) {                                             \
      case Isa::avx512vnni: return avx512vnni::function arguments;      \
      case Isa::avx512: return avx512::function arguments;              \
      case Isa::avx2: return avx2::function arguments;                  \
      default: return portable::function arguments;                     \
    }                                                                   \
  }                                                                     \
  }
#elif defined(WKV_HAVE_NEONDOT)
#define WKV_DISPATCH(function, parameters, arguments)                                            \
  namespace wkv {                                                                                \
  WKV_DISPATCH_DECLARE(portable, function, parameters)                                           \
  WKV_DISPATCH_DECLARE(neondot, function, parameters)                                            \
  inline void function parameters {                                                              \
    return active_isa() == Isa::neondot ? neondot::function arguments : portable::function arguments; \
  }                                                                                              \
  }
#else
#define WKV_DISPATCH(function, parameters, arguments)                            \
  namespace wkv {                                                                \
  WKV_DISPATCH_DECLARE(portable, function, parameters)                           \
  inline void function parameters { return portable::function arguments; }       \
  }
#endif
