// Shared by every file of the native library: how functions leave it.
#pragma once
#include <cstdint>

#if defined(_WIN32)
#define WKV_API extern "C" __declspec(dllexport)
#else
#define WKV_API extern "C" __attribute__((visibility("default")))
#endif

// Raised by one whenever a function's arguments change: a library of another build is then refused, not called.
#define WKV_ABI_VERSION 1
