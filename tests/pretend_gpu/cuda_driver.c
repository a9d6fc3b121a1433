/* A CUDA driver (libcuda.so.1) that says yes to all: enough for torch and Triton to load. */
#include <stddef.h>

int cuInit(unsigned flags) { return 0; }

int cuDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *is_active) {
    if (flags) *flags = 0;
    if (is_active) *is_active = 0;
    return 0;
}

#define SUCCEEDS(name) int name() { return 0; }
SUCCEEDS(cuCtxGetCurrent)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuDeviceGet)
SUCCEEDS(cuDeviceGetAttribute)
SUCCEEDS(cuDevicePrimaryCtxRetain)
SUCCEEDS(cuFuncGetAttribute)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuGetErrorString)
SUCCEEDS(cuLaunchCooperativeKernel)
SUCCEEDS(cuLaunchKernel)
SUCCEEDS(cuLinkAddData_v2)
SUCCEEDS(cuLinkComplete)
SUCCEEDS(cuLinkCreate_v2)
SUCCEEDS(cuModuleGetFunction)
SUCCEEDS(cuModuleLoad)
SUCCEEDS(cuModuleLoadData)
SUCCEEDS(cuModuleLoadDataEx)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuOccupancyMaxActiveBlocksPerMultiprocessor)
SUCCEEDS(cuPointerGetAttribute)
SUCCEEDS(cuTensorMapEncodeTiled)
