// Not in the packages that torch brings: empty attributes, for g++ on the host.
#pragma once
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define __align__(n) __attribute__((aligned(n)))
#define __annotate__(a)
#define __builtin_align__(n) __align__(n)
#define __cluster_dims__(...)
#define __constant__
#define __cudart_builtin__
#define __device__
#define __device_builtin__
#define __device_builtin_surface_type__
#define __device_builtin_texture_type__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __host__
#define __launch_bounds__(...)
#define __managed__
#define __no_return__ __attribute__((noreturn))
#define __shared__
#define __specialization_static
