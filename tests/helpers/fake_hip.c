/* libamdhip64 without a GPU: see fake_gpu.h. Built against AMD's own headers, which hold every
 * signature to what the real library has. */
#define __HIP_PLATFORM_AMD__
#include <hip/hip_runtime_api.h>

#define START_DEVICE 0
#include "fake_gpu.h"

/* HIP 7 made the source of this copy const. */
#if HIP_VERSION_MAJOR >= 7
typedef const void Source;
#else
typedef void Source;
#endif

hipError_t hipInit(unsigned int flags) {
    ENTER(0);
    if (flags) return MISUSE("hipInit: flags %u", flags);
    fake.initialized = 1;
    return OK;
}
/* May be asked before init. */
hipError_t hipRuntimeGetVersion(int *version) {
#ifdef OLD
    *version = 60340131;
#else
    *version = 70151831;
#endif
    return OK;
}
hipError_t hipGetLastError(void) {
    int code = fake.last_error;
    return fake.last_error = 0, code;
}
hipError_t hipGetDevice(int *device) {
    ENTER(0);
    *device = current_device;
    return OK;
}
hipError_t hipSetDevice(int device) {
    ENTER(0);
    if (device < 0 || device >= DEVICES) return NO_DEVICE;
    current_device = device;
    return OK;
}
static size_t lds_bytes(void) { return strncmp(fake.arch, "gfx950", 6) ? 65536 : 163840; }
hipError_t hipGetDevicePropertiesR0600(hipDeviceProp_tR0600 *p, int device) {
    ENTER(0);
    if (device < 0 || device >= DEVICES) return NO_DEVICE;
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "Fake Instinct");
    snprintf(p->gcnArchName, sizeof p->gcnArchName, "%s", fake.arch);
    p->totalGlobalMem = 1ull << 30, p->sharedMemPerBlock = lds_bytes(), p->warpSize = 64;
    p->maxThreadsPerBlock = MAX_BLOCK;
    p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    return OK;
}
const char *hipGetErrorName(hipError_t code) {
    return code == ILLEGAL_ADDRESS ? "hipErrorIllegalAddress" : "hipErrorSomething";
}
const char *hipGetErrorString(hipError_t code) {
    return code == ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : "it went wrong";
}
hipError_t hipDeviceSynchronize(void) {
    ENTER(1);
    return drain();
}
hipError_t hipMalloc(void **out, size_t size) {
    ENTER(1);
    return allocate(__func__, DEVICE, size, out);
}
hipError_t hipFree(void *address) {
    ENTER(1);
    return free_memory(__func__, address, DEVICE);
}
hipError_t hipHostMalloc(void **out, size_t size, unsigned int flags) {
    ENTER(1);
    if (flags) return MISUSE("hipHostMalloc: flags %u", flags);
    return allocate(__func__, PINNED, size, out);
}
hipError_t hipHostFree(void *address) {
    ENTER(1);
    return free_memory(__func__, address, PINNED);
}
hipError_t hipMemsetAsync(void *to, int byte, size_t size, hipStream_t stream) {
    ENTER(1);
    return fill_op(__func__, to, byte, size, stream);
}
hipError_t hipMemcpyHtoDAsync(hipDeviceptr_t to, Source *from, size_t size, hipStream_t stream) {
    ENTER(1);
    return copy_op(__func__, TO_DEVICE, to, from, size, stream);
}
hipError_t hipMemcpyDtoHAsync(void *to, hipDeviceptr_t from, size_t size, hipStream_t stream) {
    ENTER(1);
    return copy_op(__func__, TO_HOST, to, from, size, stream);
}
hipError_t hipStreamCreateWithFlags(hipStream_t *out, unsigned int flags) {
    ENTER(1);
    if (flags != hipStreamNonBlocking) return MISUSE("%s: flags %u", __func__, flags);
    return create(__func__, STREAM, (Object **)out);
}
hipError_t hipStreamDestroy(hipStream_t stream) {
    ENTER(1);
    return end_object(__func__, stream, STREAM);
}
hipError_t hipStreamSynchronize(hipStream_t handle) {
    ENTER(1);
    WANT(stream, handle, STREAM);
    return drain();
}
hipError_t hipEventCreateWithFlags(hipEvent_t *out, unsigned flags) {
    ENTER(1);
    if (flags & ~NO_TIME) return MISUSE("%s: flags %u", __func__, flags);
    return create_event(__func__, !(flags & NO_TIME), (Object **)out);
}
hipError_t hipEventDestroy(hipEvent_t event) {
    ENTER(1);
    return end_object(__func__, event, EVENT);
}
hipError_t hipEventRecord(hipEvent_t event, hipStream_t stream) {
    ENTER(1);
    return record_op(__func__, event, stream);
}
hipError_t hipEventSynchronize(hipEvent_t handle) {
    ENTER(1);
    WANT(event, handle, EVENT);
    return event->recorded ? drain_to(event) : MISUSE("%s: never recorded", __func__);
}
hipError_t hipEventElapsedTime(float *ms, hipEvent_t start, hipEvent_t end) {
    ENTER(1);
    return elapsed(__func__, ms, start, end);
}
hipError_t hipModuleLoadData(hipModule_t *out, const void *image) {
    ENTER(1);
    return load_module(__func__, image, EM_AMD, (Object **)out);
}
hipError_t hipModuleUnload(hipModule_t module) {
    ENTER(1);
    return end_object(__func__, module, MODULE);
}
hipError_t hipModuleGetFunction(hipFunction_t *out, hipModule_t module, const char *name) {
    ENTER(1);
    int code = get_function(__func__, module, name, (Object **)out);
    if (!code) ((Object *)*out)->shared_allowed = lds_bytes();
    return code;
}
hipError_t hipGraphCreate(hipGraph_t *out, unsigned int flags) {
    ENTER(1);
    if (flags) return MISUSE("%s: flags %u", __func__, flags);
    return create(__func__, GRAPH, (Object **)out);
}
hipError_t hipGraphDestroy(hipGraph_t graph) {
    ENTER(1);
    return end_object(__func__, graph, GRAPH);
}
hipError_t hipGraphAddKernelNode(hipGraphNode_t *out, hipGraph_t graph, const hipGraphNode_t *before,
                                 size_t count, const hipKernelNodeParams *p) {
    ENTER(1);
    NodeParams params = {p->func,
                         {p->gridDim.x, p->gridDim.y, p->gridDim.z},
                         {p->blockDim.x, p->blockDim.y, p->blockDim.z},
                         p->sharedMemBytes,
                         p->kernelParams,
                         p->extra};
    return add_node(__func__, graph, (const void *const *)before, NULL, count, params,
                    (Object **)out);
}
hipError_t hipGraphInstantiate(hipGraphExec_t *out, hipGraph_t graph, hipGraphNode_t *node, char *text,
                               size_t size) {
    ENTER(1);
    if (node || text || size) return MISUSE("%s: expected no log", __func__);
    return instantiate(__func__, graph, (Object **)out);
}
hipError_t hipGraphLaunch(hipGraphExec_t exec, hipStream_t stream) {
    ENTER(1);
    return launch_op(__func__, exec, stream);
}
hipError_t hipGraphExecDestroy(hipGraphExec_t exec) {
    ENTER(1);
    return end_object(__func__, exec, EXECUTABLE);
}
