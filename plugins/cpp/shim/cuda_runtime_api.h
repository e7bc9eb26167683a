// The two opaque CUDA types that TensorRT's headers name, for machines without the CUDA toolkit.
//
// CMake puts this folder on the include path only where cuda_runtime_api.h is not found. The types are those of the
// CUDA runtime: pointers to structures that nobody outside the driver looks into.
#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
