// A stand-in for TensorRT 11's library, under its name: opens toy engines ("toy CAPACITY VOCABULARY BATCH PROMPT
// DTYPE", of a rank also its number counted from 1 and its heads)
// and runs toy_model.h, through TensorRT's own classes. Only what a runtime calls does anything; the rest says nothing.
//
// Environment: GQA_STUB_TENSORRT_VERSION (by default the headers'), GQA_STUB_REFUSE (deserialize | context | enqueue).
#include <NvInferRuntime.h>

#include <cstdlib>
#include <sstream>

#include "stub_cuda.h"
#include "toy_model.h"
#include "toy_ranks.h"

using namespace nvinfer1;

namespace {

bool refuses(char const* what) {
    char const* const wanted = std::getenv("GQA_STUB_REFUSE");
    return wanted && std::strcmp(wanted, what) == 0;
}

ILogger* logger = nullptr;

template <typename Value>
Value refuse(Value failed, std::string const& reason) {
    logger->log(ILogger::Severity::kERROR, reason.c_str());
    return failed;
}

class StubContext final : public IExecutionContext, public apiv::VExecutionContext {
public:
    StubContext(ICudaEngine const& engine, ToyCall call) : engine_(engine), call_(std::move(call)) { mImpl = this; }

    bool setOptimizationProfileAsync(int32_t index, cudaStream_t) noexcept override {
        call_.profile = index;
        gqa_stub_log("profile " + std::to_string(index));
        return index == 0 || index == 1;
    }
    bool setInputShape(char const* name, Dims const& dims) noexcept override {
        call_.tensors[name].shape.assign(dims.d, dims.d + dims.nbDims);
        return true;
    }
    bool setTensorAddress(char const* name, void* data) noexcept override {
        call_.tensors[name].address = data;
        return true;
    }
    bool enqueueV3(cudaStream_t stream) noexcept override {
        if (refuses("enqueue")) return refuse(false, "enqueue was told to fail");
        std::string const problem = call_.problem();
        if (!problem.empty()) return refuse(false, problem);
        if (call_.rank) {
            if (toy::breaks("enqueue", count_)) return refuse(false, "enqueue was told to fail");
            toy::enqueue_rank(call_, stream, count_++);
            return true;
        }
        gqa_stub_enqueue(stream, [call = call_] {
            gqa_stub_log("run profile " + std::to_string(call.profile));
            call.run();
        });
        return true;
    }

    IExecutionContext* getPImpl() noexcept override { return this; }
    ICudaEngine const& getEngine() const noexcept override { return engine_; }
    int32_t getOptimizationProfile() const noexcept override { return call_.profile; }
    Dims getTensorShape(char const*) const noexcept override { return {}; }
    Dims getTensorStrides(char const*) const noexcept override { return {}; }
    bool allInputDimensionsSpecified() const noexcept override { return true; }
    void setDebugSync(bool) noexcept override {}
    bool getDebugSync() const noexcept override { return false; }
    void setProfiler(IProfiler*) noexcept override {}
    IProfiler* getProfiler() const noexcept override { return nullptr; }
    void setName(char const*) noexcept override {}
    char const* getName() const noexcept override { return ""; }
    void setDeviceMemory(void*) noexcept override {}
    void setErrorRecorder(IErrorRecorder*) noexcept override {}
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    bool executeV2(void* const*) noexcept override { return false; }
    void setEnqueueEmitsProfile(bool) noexcept override {}
    bool getEnqueueEmitsProfile() const noexcept override { return false; }
    bool reportToProfiler() const noexcept override { return false; }
    void const* getTensorAddress(char const*) const noexcept override { return nullptr; }
    bool setInputTensorAddress(char const*, void const*) noexcept override { return false; }
    bool setOutputTensorAddress(char const*, void*) noexcept override { return false; }
    int32_t inferShapes(int32_t, char const**) noexcept override { return 0; }
    bool setInputConsumedEvent(cudaEvent_t) noexcept override { return false; }
    cudaEvent_t getInputConsumedEvent() const noexcept override { return nullptr; }
    void* getOutputTensorAddress(char const*) const noexcept override { return nullptr; }
    bool setOutputAllocator(char const*, IOutputAllocator*) noexcept override { return false; }
    IOutputAllocator* getOutputAllocator(char const*) noexcept override { return nullptr; }
    int64_t getMaxOutputSize(char const*) const noexcept override { return 0; }
    bool setTemporaryStorageAllocator(IGpuAllocator*) noexcept override { return false; }
    IGpuAllocator* getTemporaryStorageAllocator() const noexcept override { return nullptr; }
    void setPersistentCacheLimit(size_t) noexcept override {}
    size_t getPersistentCacheLimit() const noexcept override { return 0; }
    bool setNvtxVerbosity(ProfilingVerbosity) noexcept override { return false; }
    ProfilingVerbosity getNvtxVerbosity() const noexcept override { return ProfilingVerbosity::kNONE; }
    void setAuxStreams(cudaStream_t*, int32_t) noexcept override {}
    bool setDebugListener(IDebugListener*) noexcept override { return false; }
    IDebugListener* getDebugListener() noexcept override { return nullptr; }
    bool setTensorDebugState(char const*, bool) noexcept override { return false; }
    bool getDebugState(char const*) const noexcept override { return false; }
    bool setAllTensorsDebugState(bool) noexcept override { return false; }
    size_t updateDeviceMemorySizeForShapes() noexcept override { return 0; }
    void setDeviceMemoryV2(void*, int64_t) noexcept override {}
    IRuntimeConfig* getRuntimeConfig() const noexcept override { return nullptr; }
    bool setUnfusedTensorsDebugState(bool) noexcept override { return false; }
    bool getUnfusedTensorsDebugState() const noexcept override { return false; }
    bool setCommunicator(void* communicator) noexcept override {
        if (toy::breaks("join")) return refuse(false, "the communicator was told to be refused");
        gqa_stub_log("joined profile " + std::to_string(call_.profile));
        call_.communicator = communicator;
        return true;
    }

private:
    ICudaEngine const& engine_;
    ToyCall call_;
    int count_ = 0;
};

class StubEngine final : public ICudaEngine, public apiv::VCudaEngine {
public:
    explicit StubEngine(ToyCall call) : call_(std::move(call)), names_(ToyCall::names(true, true)) { mImpl = this; }
    ~StubEngine() noexcept override { gqa_stub_log("engine closed"); }

    IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy) noexcept override {
        if (refuses("context")) return refuse<IExecutionContext*>(nullptr, "no memory for a context");
        return new StubContext(*this, call_);
    }
    int32_t getNbIOTensors() const noexcept override { return static_cast<int32_t>(names_.size()); }
    char const* getIOTensorName(int32_t index) const noexcept override {
        return names_[static_cast<std::size_t>(index)].c_str();
    }
    int32_t getNbOptimizationProfiles() const noexcept override { return 2; }

    ICudaEngine* getPImpl() noexcept override { return this; }
    int32_t getNbLayers() const noexcept override { return 0; }
    IHostMemory* serialize() const noexcept override { return nullptr; }
    bool isRefittable() const noexcept override { return false; }
    char const* getName() const noexcept override { return "toy"; }
    EngineCapability getEngineCapability() const noexcept override { return EngineCapability::kSTANDARD; }
    void setErrorRecorder(IErrorRecorder*) noexcept override {}
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    TacticSources getTacticSources() const noexcept override { return 0; }
    ProfilingVerbosity getProfilingVerbosity() const noexcept override { return ProfilingVerbosity::kNONE; }
    IEngineInspector* createEngineInspector() const noexcept override { return nullptr; }
    Dims getTensorShape(char const*) const noexcept override { return {}; }
    DataType getTensorDataType(char const*) const noexcept override { return DataType::kHALF; }
    TensorLocation getTensorLocation(char const*) const noexcept override { return TensorLocation::kDEVICE; }
    bool isShapeInferenceIO(char const*) const noexcept override { return false; }
    TensorIOMode getTensorIOMode(char const*) const noexcept override { return TensorIOMode::kNONE; }
    int32_t getTensorBytesPerComponent(char const*) const noexcept override { return 0; }
    int32_t getTensorComponentsPerElement(char const*) const noexcept override { return 0; }
    TensorFormat getTensorFormat(char const*) const noexcept override { return TensorFormat::kLINEAR; }
    char const* getTensorFormatDesc(char const*) const noexcept override { return ""; }
    int32_t getTensorVectorizedDim(char const*) const noexcept override { return -1; }
    Dims getProfileShape(char const*, int32_t, OptProfileSelector) const noexcept override { return {}; }
    HardwareCompatibilityLevel getHardwareCompatibilityLevel() const noexcept override {
        return {};
    }
    int32_t getNbAuxStreams() const noexcept override { return 0; }
    int32_t getTensorBytesPerComponentV2(char const*, int32_t) const noexcept override { return 0; }
    int32_t getTensorComponentsPerElementV2(char const*, int32_t) const noexcept override { return 0; }
    TensorFormat getTensorFormatV2(char const*, int32_t) const noexcept override { return TensorFormat::kLINEAR; }
    char const* getTensorFormatDescV2(char const*, int32_t) const noexcept override { return ""; }
    int32_t getTensorVectorizedDimV2(char const*, int32_t) const noexcept override { return -1; }
    ISerializationConfig* createSerializationConfig() noexcept override { return nullptr; }
    IHostMemory* serializeWithConfig(ISerializationConfig&) const noexcept override { return nullptr; }
    IRefitter* createRefitter(ILogger&) noexcept override { return nullptr; }
    int64_t getStreamableWeightsSize() const noexcept override { return 0; }
    bool isDebugTensor(char const*) const noexcept override { return false; }
    bool setWeightStreamingBudgetV2(int64_t) noexcept override { return false; }
    int64_t getWeightStreamingBudgetV2() const noexcept override { return 0; }
    int64_t getWeightStreamingAutomaticBudget() const noexcept override { return 0; }
    int64_t getWeightStreamingScratchMemorySize() const noexcept override { return 0; }
    int64_t getDeviceMemorySizeV2() const noexcept override { return 0; }
    int64_t getDeviceMemorySizeForProfileV2(int32_t) const noexcept override { return 0; }
    int64_t const* getProfileTensorValuesV2(char const*, int32_t, OptProfileSelector) const noexcept override {
        return nullptr;
    }
    IExecutionContext* createExecutionContextWithRuntimeConfig(IRuntimeConfig*) noexcept override { return nullptr; }
    IRuntimeConfig* createRuntimeConfig() noexcept override { return nullptr; }
    int64_t getEngineStat(EngineStat) const noexcept override { return 0; }
    char const* getAliasedInputTensor(char const*) const noexcept override { return nullptr; }

private:
    ToyCall call_;
    std::vector<std::string> names_;
};

class StubRegistry final : public IPluginRegistry {
public:
    PluginLibraryHandle loadLibrary(AsciiChar const* path) noexcept override {
        gqa_stub_log(std::string("plugin library ") + path);
        return this;
    }
    void deregisterLibrary(PluginLibraryHandle) noexcept override {}
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    void setErrorRecorder(IErrorRecorder* const) noexcept override {}
    bool isParentSearchEnabled() const override { return true; }
    void setParentSearchEnabled(bool const) override {}
    bool registerCreator(IPluginCreatorInterface&, AsciiChar const* const) noexcept override { return false; }
    IPluginCreatorInterface* const* getAllCreators(int32_t* const) const noexcept override { return nullptr; }
    IPluginCreatorInterface* getCreator(AsciiChar const* const, AsciiChar const* const,
                                        AsciiChar const* const) noexcept override {
        return nullptr;
    }
    bool deregisterCreator(IPluginCreatorInterface const&) noexcept override { return false; }
    IPluginResource* acquirePluginResource(AsciiChar const*, IPluginResource*) noexcept override { return nullptr; }
    int32_t releasePluginResource(AsciiChar const*) noexcept override { return 0; }
    IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* const) noexcept override { return nullptr; }
};

class StubRuntime final : public IRuntime, public apiv::VRuntime {
public:
    StubRuntime() { mImpl = this; }
    ~StubRuntime() noexcept override { gqa_stub_log("runtime closed"); }

    ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override {
        std::istringstream words(std::string(static_cast<char const*>(blob), size));
        std::string magic, dtype;
        ToyCall call;
        words >> magic >> call.capacity >> call.vocabulary >> call.max_batch >> call.max_prompt >> dtype;
        words >> call.rank >> call.heads;  // of a rank's engine only
        if (!call.heads) call.heads = 1;
        if (magic != "toy" || refuses("deserialize")) return refuse<ICudaEngine*>(nullptr, "the engine is damaged");
        call.half = dtype == "float16";
        return new StubEngine(std::move(call));
    }
    IPluginRegistry& getPluginRegistry() noexcept override { return registry_; }

    IRuntime* getPImpl() noexcept override { return this; }
    void setDLACore(int32_t) noexcept override {}
    int32_t getDLACore() const noexcept override { return 0; }
    int32_t getNbDLACores() const noexcept override { return 0; }
    void setGpuAllocator(IGpuAllocator*) noexcept override {}
    void setErrorRecorder(IErrorRecorder*) noexcept override {}
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    ILogger* getLogger() const noexcept override { return logger; }
    bool setMaxThreads(int32_t) noexcept override { return false; }
    int32_t getMaxThreads() const noexcept override { return 1; }
    void setTemporaryDirectory(char const*) noexcept override {}
    char const* getTemporaryDirectory() const noexcept override { return ""; }
    void setTempfileControlFlags(TempfileControlFlags) noexcept override {}
    TempfileControlFlags getTempfileControlFlags() const noexcept override { return 0; }
    void setPluginRegistryParent(IPluginRegistry*) noexcept override {}
    IRuntime* loadRuntime(char const*) noexcept override { return nullptr; }
    void setEngineHostCodeAllowed(bool) noexcept override {}
    bool getEngineHostCodeAllowed() const noexcept override { return false; }
    ICudaEngine* deserializeCudaEngineV2(IStreamReaderV2&) noexcept override { return nullptr; }

private:
    StubRegistry registry_;
};

// "11.1.0", part 0, 1 or 2.
int32_t version_part(int part, int32_t otherwise) {
    char const* const text = std::getenv("GQA_STUB_TENSORRT_VERSION");
    if (!text) return otherwise;
    std::istringstream words(text);
    std::string word;
    for (int i = 0; i <= part; ++i) std::getline(words, word, '.');
    return std::atoi(word.c_str());
}

}  // namespace

#define STUB extern "C" __attribute__((visibility("default")))

STUB void* createInferRuntime_INTERNAL(void* given, int32_t) noexcept {
    logger = static_cast<ILogger*>(given);
    return static_cast<IRuntime*>(new StubRuntime);
}
STUB int32_t getInferLibMajorVersion() noexcept { return version_part(0, NV_TENSORRT_MAJOR); }
STUB int32_t getInferLibMinorVersion() noexcept { return version_part(1, NV_TENSORRT_MINOR); }
STUB int32_t getInferLibPatchVersion() noexcept { return version_part(2, NV_TENSORRT_PATCH); }
