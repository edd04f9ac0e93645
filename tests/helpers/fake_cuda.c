/* libcuda without a GPU: see fake_gpu.h. Built against NVIDIA's own header, which holds every
 * signature to what the real library has. */
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>

#define START_DEVICE -1
#include "fake_gpu.h"

#define MAX_SHARED (227 << 10)

/* Device d's primary context is &contexts[d]; `stack` is this thread's. */
static int contexts[DEVICES];
static __thread CUcontext stack[8];
static __thread int depth;

CUresult cuInit(unsigned int flags) {
    ENTER(0);
    if (flags) return MISUSE("cuInit: flags %u", flags);
    fake.initialized = 1;
    return OK;
}
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    ENTER(0);
    if (ordinal < 0 || ordinal >= DEVICES) return NO_DEVICE;
    *device = ordinal;
    return OK;
}
CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
    ENTER(0);
    snprintf(name, size, "Fake GPU %d", device);
    return OK;
}
CUresult cuDeviceTotalMem_v2(size_t *size, CUdevice device) {
    ENTER(0);
    if (device < 0 || device >= DEVICES) return NO_DEVICE;
    *size = 1ull << 30;
    return OK;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    ENTER(0);
    if (device < 0 || device >= DEVICES) return NO_DEVICE;
    switch ((int)attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = MAX_BLOCK; return OK;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: *value = 2147483647; return OK;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: *value = 65535; return OK;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; return OK;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = atoi(fake.arch) / 10; return OK;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = atoi(fake.arch) % 10; return OK;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = MAX_SHARED; return OK;
    }
    return MISUSE("%s: attribute %d", __func__, (int)attribute);
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *out, CUdevice device) {
    ENTER(0);
    fake.retained++;
    *out = (CUcontext)&contexts[device];
    return OK;
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    ENTER(0);
    if (device < 0 || device >= DEVICES || !fake.retained) return MISUSE("%s", __func__);
    fake.retained--;
    return OK;
}
static void use_top(void) { current_device = depth ? (int)((int *)stack[depth - 1] - contexts) : -1; }
CUresult cuCtxPushCurrent_v2(CUcontext context) {
    ENTER(0);
    if (!context || !fake.retained || depth == 8) return MISUSE("%s: no retained context", __func__);
    stack[depth++] = context;
    use_top();
    return OK;
}
CUresult cuCtxPopCurrent_v2(CUcontext *out) {
    count_call(__func__);
    if (!depth) return MISUSE("%s: nothing to pop", __func__);
    *out = stack[--depth];
    use_top();
    return fake.sticky;
}
CUresult cuGetErrorName(CUresult code, const char **text) {
    *text = code == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_SOMETHING";
    return OK;
}
CUresult cuGetErrorString(CUresult code, const char **text) {
    *text = code == ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : "it went wrong";
    return OK;
}
CUresult cuCtxSynchronize(void) {
    ENTER(1);
    return drain();
}
CUresult cuMemAlloc_v2(CUdeviceptr *out, size_t size) {
    ENTER(1);
    return allocate(__func__, DEVICE, size, (void **)out);
}
CUresult cuMemFree_v2(CUdeviceptr address) {
    ENTER(1);
    return free_memory(__func__, (void *)address, DEVICE);
}
CUresult cuMemHostAlloc(void **out, size_t size, unsigned int flags) {
    ENTER(1);
    if (flags) return MISUSE("cuMemHostAlloc: flags %u", flags);
    return allocate(__func__, PINNED, size, out);
}
CUresult cuMemFreeHost(void *address) {
    ENTER(1);
    return free_memory(__func__, address, PINNED);
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char byte, size_t size, CUstream stream) {
    ENTER(1);
    return fill_op(__func__, (void *)to, byte, size, stream);
}
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, CUstream stream) {
    ENTER(1);
    return copy_op(__func__, TO_DEVICE, (void *)to, from, size, stream);
}
CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, CUstream stream) {
    ENTER(1);
    return copy_op(__func__, TO_HOST, to, (void *)from, size, stream);
}
CUresult cuStreamCreate(CUstream *out, unsigned int flags) {
    ENTER(1);
    if (flags != CU_STREAM_NON_BLOCKING) return MISUSE("%s: flags %u", __func__, flags);
    return create(__func__, STREAM, (Object **)out);
}
CUresult cuStreamDestroy_v2(CUstream stream) {
    ENTER(1);
    return end_object(__func__, stream, STREAM);
}
CUresult cuStreamSynchronize(CUstream handle) {
    ENTER(1);
    WANT(stream, handle, STREAM);
    return drain();
}
CUresult cuEventCreate(CUevent *out, unsigned int flags) {
    ENTER(1);
    if (flags & ~NO_TIME) return MISUSE("%s: flags %u", __func__, flags);
    return create_event(__func__, !(flags & NO_TIME), (Object **)out);
}
CUresult cuEventDestroy_v2(CUevent event) {
    ENTER(1);
    return end_object(__func__, event, EVENT);
}
CUresult cuEventRecord(CUevent event, CUstream stream) {
    ENTER(1);
    return record_op(__func__, event, stream);
}
CUresult cuEventSynchronize(CUevent handle) {
    ENTER(1);
    WANT(event, handle, EVENT);
    return event->recorded ? drain_to(event) : MISUSE("%s: never recorded", __func__);
}
CUresult cuEventElapsedTime(float *ms, CUevent start, CUevent end) {
    ENTER(1);
    return elapsed(__func__, ms, start, end);
}
CUresult cuModuleLoadData(CUmodule *out, const void *image) {
    ENTER(1);
    return load_module(__func__, image, EM_NVIDIA, (Object **)out);
}
CUresult cuModuleUnload(CUmodule module) {
    ENTER(1);
    return end_object(__func__, module, MODULE);
}
CUresult cuModuleGetFunction(CUfunction *out, CUmodule module, const char *name) {
    ENTER(1);
    return get_function(__func__, module, name, (Object **)out);
}
CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
    ENTER(1);
    WANT(function, handle, FUNCTION);
    if (attribute == CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT)
        return value == CU_SHAREDMEM_CARVEOUT_MAX_SHARED ? OK : MISUSE("%s: carveout %d", __func__, value);
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value > MAX_SHARED)
        return MISUSE("%s: attribute %d to %d", __func__, (int)attribute, value);
    function->shared_allowed = value;
    return OK;
}
CUresult cuGraphCreate(CUgraph *out, unsigned int flags) {
    ENTER(1);
    if (flags) return MISUSE("%s: flags %u", __func__, flags);
    return create(__func__, GRAPH, (Object **)out);
}
CUresult cuGraphDestroy(CUgraph graph) {
    ENTER(1);
    return end_object(__func__, graph, GRAPH);
}
CUresult cuGraphAddKernelNode_v2(CUgraphNode *out, CUgraph graph, const CUgraphNode *before,
                                 size_t count, const CUDA_KERNEL_NODE_PARAMS_v2 *p) {
    ENTER(1);
    if (p->kern || p->ctx) return MISUSE("%s: kern or ctx beside func", __func__);
    NodeParams params = {p->func,
                         {p->gridDimX, p->gridDimY, p->gridDimZ},
                         {p->blockDimX, p->blockDimY, p->blockDimZ},
                         p->sharedMemBytes,
                         p->kernelParams,
                         p->extra};
    return add_node(__func__, graph, (const void *const *)before, NULL, count, params,
                    (Object **)out);
}
#ifndef WITHOUT_ADD_NODE
CUresult cuGraphAddNode_v2(CUgraphNode *out, CUgraph graph, const CUgraphNode *before,
                           const CUgraphEdgeData *edges, size_t count, CUgraphNodeParams *whole) {
    ENTER(1);
    static const long long zeros[29];
    const CUDA_KERNEL_NODE_PARAMS_v3 *p = &whole->kernel;
    unsigned char programmatic[MAX_EDGES] = {0};
    if (whole->type != CU_GRAPH_NODE_TYPE_KERNEL || memcmp(whole->reserved0, zeros, 12) ||
        whole->reserved2 || memcmp(p + 1, zeros, sizeof whole->reserved1 - sizeof *p))
        return MISUSE("%s: expected a kernel node and zeros in what is reserved", __func__);
    if (p->kern || p->ctx) return MISUSE("%s: kern or ctx beside func", __func__);
    for (size_t i = 0; i < count && i < MAX_EDGES; i++) {
        CUgraphEdgeData e = edges[i];
        int plain = !e.from_port && !e.to_port && !e.type;
        programmatic[i] = e.from_port == CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC && !e.to_port &&
                          e.type == CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC;
        if ((!plain && !programmatic[i]) || memcmp(e.reserved, zeros, sizeof e.reserved))
            return MISUSE("%s: edge %zu is %d %d %d", __func__, i, e.from_port, e.to_port, e.type);
    }
    NodeParams params = {p->func,
                         {p->gridDimX, p->gridDimY, p->gridDimZ},
                         {p->blockDimX, p->blockDimY, p->blockDimZ},
                         p->sharedMemBytes,
                         p->kernelParams,
                         p->extra};
    return add_node(__func__, graph, (const void *const *)before, programmatic, count, params,
                    (Object **)out);
}
#endif
CUresult cuGraphInstantiateWithFlags(CUgraphExec *out, CUgraph graph, unsigned long long flags) {
    ENTER(1);
    if (flags) return MISUSE("%s: flags %llu", __func__, flags);
    return instantiate(__func__, graph, (Object **)out);
}
CUresult cuGraphUpload(CUgraphExec handle, CUstream stream_handle) {
    ENTER(1);
    WANT(exec, handle, EXECUTABLE);
    WANT(stream, stream_handle, STREAM);
    return OK;
}
CUresult cuGraphLaunch(CUgraphExec exec, CUstream stream) {
    ENTER(1);
    return launch_op(__func__, exec, stream);
}
CUresult cuGraphExecDestroy(CUgraphExec exec) {
    ENTER(1);
    return end_object(__func__, exec, EXECUTABLE);
}
