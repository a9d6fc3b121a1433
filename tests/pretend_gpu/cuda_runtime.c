/* A CUDA runtime, preloaded in front of torch's: one card of the compute capability PRETEND_CAPABILITY ("9.0").
 * Its memory is the host's, its kernels do nothing, its events take a millisecond. It counts what waits. */
#include <driver_types.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector_types.h>

static int major = 9, minor = 0;
static long waits, launches;

__attribute__((constructor)) static void read_capability(void) {
    const char *text = getenv("PRETEND_CAPABILITY");
    if (text) sscanf(text, "%d.%d", &major, &minor);
}

long pretend_waits(void) { return waits; }
long pretend_launches(void) { return launches; }

static int processors(void) {
    if (major == 9) return 132;                    /* H100 */
    if (major == 8) return minor == 9 ? 58 : 108;  /* L4, A100 */
    return 40;                                     /* T4 */
}

static size_t shared_memory(void) {
    if (major == 9) return 232448;
    if (major == 8) return minor == 9 ? 101376 : 166912;
    return 65536;
}

/* -- what the card is -- */

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 1; return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *left, size_t *total) { *left = 79ul << 30; *total = 80ul << 30; return cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = minor; break;
        case cudaDevAttrMultiProcessorCount: *value = processors(); break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)shared_memory(); break;
        case cudaDevAttrWarpSize: *value = 32; break;
        default: *value = 1;
    }
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *card, int device) {
    memset(card, 0, sizeof *card);
    snprintf(card->name, sizeof card->name, "pretend GPU of capability %d.%d", major, minor);
    card->major = major;
    card->minor = minor;
    card->multiProcessorCount = processors();
    card->totalGlobalMem = 80ul << 30;
    card->warpSize = 32;
    card->regsPerBlock = 65536;
    card->regsPerMultiprocessor = 65536;
    card->maxThreadsPerBlock = 1024;
    card->maxThreadsPerMultiProcessor = 2048;
    card->sharedMemPerBlock = 49152;
    card->sharedMemPerBlockOptin = shared_memory();
    card->sharedMemPerMultiprocessor = shared_memory() + 1024;
    card->l2CacheSize = 50 << 20;
    card->maxThreadsDim[0] = 1024;
    card->maxThreadsDim[1] = 1024;
    card->maxThreadsDim[2] = 64;
    card->maxGridSize[0] = 2147483647;
    card->maxGridSize[1] = 65535;
    card->maxGridSize[2] = 65535;
    return cudaSuccess;
}

/* -- memory -- */

static size_t whole(size_t size, size_t block) { return (size + block - 1) / block * block; }

cudaError_t cudaMalloc(void **memory, size_t size) {
    *memory = aligned_alloc(512, whole(size, 512));
    return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaHostAlloc(void **memory, size_t size, unsigned flags) {
    *memory = aligned_alloc(4096, whole(size, 4096));
    return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void *memory) { free(memory); return cudaSuccess; }
cudaError_t cudaFreeHost(void *memory) { free(memory); return cudaSuccess; }
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    waits++;
    memcpy(to, from, size);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    memcpy(to, from, size);
    return cudaSuccess;
}
cudaError_t cudaMemset(void *memory, int value, size_t size) { memset(memory, value, size); return cudaSuccess; }
cudaError_t cudaMemsetAsync(void *memory, int value, size_t size, cudaStream_t stream) {
    memset(memory, value, size);
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *memory) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = cudaMemoryTypeUnregistered;
    return cudaSuccess;
}

/* -- kernels -- */

cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **in, size_t shared, cudaStream_t stream) {
    launches++;
    return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const void *config, const void *kernel, void **in) { launches++; return cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute attribute, int value) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *kernel) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->binaryVersion = 10 * major + minor;
    attributes->ptxVersion = 10 * major + minor;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *kernel, int threads, size_t shared, unsigned flags) {
    *blocks = 4;
    return cudaSuccess;
}

/* -- streams and events -- */

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { waits++; return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { waits++; return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { waits++; return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *low, int *high) { *low = 0; *high = -5; return cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    *stream = (cudaStream_t)0x10;
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo() { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { return cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(void *mode) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { *event = (cudaEvent_t)0x20; return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) { *ms = 1; return cudaSuccess; }

cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }
