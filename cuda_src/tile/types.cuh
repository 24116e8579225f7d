// Fixed-width names (NVRTC has no <cstdint> without an include path).
#pragma once
using uint8_t = unsigned char;
using int8_t = signed char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#ifndef INFINITY
#define INFINITY __int_as_float(0x7F800000)
#endif
