/* What CUDA's own headers take from nvcc's, which its wheels for Python lack. */
#define __host__
#define __device__
#define __location__(a)
#define __inline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __device_builtin__
#define __cudart_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __CUDA_BUILTIN_ALIGN__
#define CUDARTAPI
#define CUDART_DEVICE
