// For loops that the compiler makes fast by itself: a function marked EACH_CPU is compiled for new processors and for
// old ones, and its first call takes what this one has.

#pragma once

#if defined(__x86_64__) && defined(__GLIBC__)
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH_CPU
#endif
#define RESTRICT __restrict__
