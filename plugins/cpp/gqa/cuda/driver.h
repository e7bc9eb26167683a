// The CUDA driver's functions that are used here, found in libcuda.so.1 when first asked for.
//
// Declared by hand (they are the driver's stable binary interface), so that no CUDA toolkit is needed to compile and no
// driver to load: a machine without a GPU builds engines with the plugin.
// Source: CUDA Driver API reference. Types are opaque pointers there too.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUctx_st;
struct CUmod_st;
struct CUfunc_st;
struct CUstream_st;
struct CUgraph_st;
struct CUgraphExec_st;

namespace gqa::cuda {

using Result = int;  // CUresult
using Device = int;
using Context = CUctx_st*;
using Module = CUmod_st*;
using Function = CUfunc_st*;
using Stream = CUstream_st*;  // the same type as the runtime API's cudaStream_t
using Graph = CUgraph_st*;
using GraphExec = CUgraphExec_st*;
using Address = std::uint64_t;  // CUdeviceptr

constexpr Result kSuccess = 0, kNotReady = 600;
// CUdevice_attribute
constexpr int kMultiprocessorCount = 16, kCapabilityMajor = 75, kCapabilityMinor = 76;
constexpr int kMaxDynamicSharedBytes = 8;  // CUfunction_attribute
constexpr unsigned kNonBlockingStream = 1;
constexpr int kCaptureThreadLocal = 1;  // CUstreamCaptureMode: other threads may allocate meanwhile

// X(name here, symbol, parameters)
#define GQA_CUDA_FUNCTIONS(X)                                                                                        \
    X(init, "cuInit", (unsigned flags))                                                                              \
    X(get_error_name, "cuGetErrorName", (Result, char const** text))                                                 \
    X(get_error_string, "cuGetErrorString", (Result, char const** text))                                             \
    X(device_get, "cuDeviceGet", (Device*, int ordinal))                                                             \
    X(device_get_count, "cuDeviceGetCount", (int*))                                                                  \
    X(device_get_attribute, "cuDeviceGetAttribute", (int* value, int attribute, Device))                             \
    X(primary_context_retain, "cuDevicePrimaryCtxRetain", (Context*, Device))                                        \
    X(primary_context_release, "cuDevicePrimaryCtxRelease_v2", (Device))                                             \
    X(context_get_current, "cuCtxGetCurrent", (Context*))                                                            \
    X(context_set_current, "cuCtxSetCurrent", (Context))                                                             \
    X(context_get_device, "cuCtxGetDevice", (Device*))                                                               \
    X(context_get_id, "cuCtxGetId", (Context, unsigned long long* id))                                               \
    X(module_load_data, "cuModuleLoadData", (Module*, void const* image))                                            \
    X(module_unload, "cuModuleUnload", (Module))                                                                     \
    X(module_get_function, "cuModuleGetFunction", (Function*, Module, char const* name))                             \
    X(function_set_attribute, "cuFuncSetAttribute", (Function, int attribute, int value))                            \
    X(launch_kernel, "cuLaunchKernel",                                                                               \
      (Function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,              \
       unsigned block_z, unsigned shared_bytes, Stream, void** arguments, void** extra))                             \
    X(allocate, "cuMemAlloc_v2", (Address*, std::size_t bytes))                                                      \
    X(free, "cuMemFree_v2", (Address))                                                                               \
    X(allocate_host, "cuMemAllocHost_v2", (void**, std::size_t bytes))                                               \
    X(free_host, "cuMemFreeHost", (void*))                                                                           \
    X(fill, "cuMemsetD8Async", (Address, unsigned char value, std::size_t bytes, Stream))                            \
    X(to_device, "cuMemcpyHtoDAsync_v2", (Address, void const* host, std::size_t bytes, Stream))                     \
    X(to_host, "cuMemcpyDtoHAsync_v2", (void* host, Address, std::size_t bytes, Stream))                             \
    X(on_device, "cuMemcpyDtoDAsync_v2", (Address to, Address from, std::size_t bytes, Stream))                       \
    X(stream_create, "cuStreamCreate", (Stream*, unsigned flags))                                                    \
    X(stream_destroy, "cuStreamDestroy_v2", (Stream))                                                                \
    X(stream_synchronize, "cuStreamSynchronize", (Stream))                                                           \
    X(stream_query, "cuStreamQuery", (Stream))                                                                       \
    X(capture_begin, "cuStreamBeginCapture_v2", (Stream, int mode))                                                  \
    X(capture_end, "cuStreamEndCapture", (Stream, Graph*))                                                           \
    X(graph_instantiate, "cuGraphInstantiateWithFlags", (GraphExec*, Graph, unsigned long long flags))               \
    X(graph_launch, "cuGraphLaunch", (GraphExec, Stream))                                                            \
    X(graph_destroy, "cuGraphDestroy", (Graph))                                                                      \
    X(graph_exec_destroy, "cuGraphExecDestroy", (GraphExec))

struct Driver {
#define GQA_CUDA_MEMBER(name, symbol, parameters) Result(*name) parameters;
    GQA_CUDA_FUNCTIONS(GQA_CUDA_MEMBER)
#undef GQA_CUDA_MEMBER
};

// The driver, loaded and initialised by the first call. Throws Error with the fix where there is none.
Driver const& driver();

// Throws Error for any result but success. doing: "loading a kernel".
void check(Result result, char const* doing);

struct DeviceFacts {
    int sm_count;
    int capability;  // major * 10 + minor
};
DeviceFacts device_facts(Device device);

}  // namespace gqa::cuda
