# TensorRT::headers: the include folders of TensorRT (or TensorRT-RTX) and of CUDA, or its two types from shim/.
find_path(TENSORRT_INCLUDE_DIR NvInferRuntime.h
          HINTS "${TensorRT_ROOT}" "${TENSORRT_ROOT}" ENV TensorRT_ROOT ENV TENSORRT_ROOT
          PATH_SUFFIXES include include/x86_64-linux-gnu include/aarch64-linux-gnu)
if(NOT TENSORRT_INCLUDE_DIR)
  message(FATAL_ERROR "TensorRT's headers (NvInferRuntime.h) were not found.\n"
    "fix: pass -DTensorRT_ROOT=FOLDER, the unpacked TensorRT or TensorRT-RTX archive, or a checkout of "
    "https://github.com/NVIDIA/TensorRT (its include/ is enough). "
    "-DGQA_WITHOUT_TENSORRT=ON builds the parts that need none.")
endif()

find_path(GQA_CUDA_INCLUDE_DIR cuda_runtime_api.h
          HINTS "${CUDAToolkit_ROOT}" ENV CUDAToolkit_ROOT ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda
          PATH_SUFFIXES include targets/x86_64-linux/include)
if(NOT GQA_CUDA_INCLUDE_DIR)
  set(GQA_CUDA_INCLUDE_DIR "${CMAKE_CURRENT_LIST_DIR}/../shim" CACHE PATH "folder of cuda_runtime_api.h" FORCE)
endif()

file(STRINGS "${TENSORRT_INCLUDE_DIR}/NvInferVersion.h" GQA_VERSION_LINES REGEX
     "#define (TRT|NV_TENSORRT)_(MAJOR|MINOR)[A-Z_]* [0-9]")
string(REGEX REPLACE "[^0-9;]" "" GQA_VERSION "${GQA_VERSION_LINES}")
string(REPLACE ";" "." GQA_VERSION "${GQA_VERSION}")
set(GQA_VERSION "${GQA_VERSION}" CACHE INTERNAL "of the headers")
if(GQA_VERSION_LINES MATCHES "_RTX")
  set(GQA_FLAVOR "TensorRT-RTX" CACHE INTERNAL "of the headers")
else()
  set(GQA_FLAVOR "TensorRT" CACHE INTERNAL "of the headers")
endif()
message(STATUS "Headers: ${GQA_FLAVOR} ${GQA_VERSION} in ${TENSORRT_INCLUDE_DIR}, CUDA in ${GQA_CUDA_INCLUDE_DIR}")

add_library(TensorRT::headers INTERFACE IMPORTED GLOBAL)
target_include_directories(TensorRT::headers SYSTEM INTERFACE "${TENSORRT_INCLUDE_DIR}" "${GQA_CUDA_INCLUDE_DIR}")
