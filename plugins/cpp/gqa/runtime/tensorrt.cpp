#include "gqa/runtime/tensorrt.h"

#include <NvInferRuntime.h>

#include <algorithm>
#include <fstream>
#include <mutex>
#include <utility>
#include <vector>

#include "gqa/core/error.h"
#include "gqa/core/shared_library.h"

namespace gqa {
namespace {

#ifdef TRT_MAJOR_RTX
constexpr char kFlavor[] = "rtx", kProduct[] = "TensorRT-RTX";
std::string library_name() { return "libtensorrt_rtx.so." + std::to_string(NV_TENSORRT_MAJOR); }
#else
constexpr char kFlavor[] = "tensorrt", kProduct[] = "TensorRT";
std::string library_name() { return "libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR); }
#endif

std::string install_hint() {
    return std::string("install ") + kProduct + " " + std::to_string(NV_TENSORRT_MAJOR) +
           " and have its lib folder on LD_LIBRARY_PATH";
}

// Errors are kept for the exception that follows; warnings go to the caller's log.
class Logger final : public nvinfer1::ILogger {
public:
    explicit Logger(TensorRt::Log log) : log_(std::move(log)) {}

    void log(Severity severity, char const* message) noexcept override {
        try {
            std::lock_guard const guard(lock_);  // TensorRT logs from threads of its own
            if (severity <= Severity::kERROR) errors_ += (errors_.empty() ? "" : "; ") + std::string(message);
            if (severity <= Severity::kWARNING) log_(std::string(kProduct) + ": " + message);
        } catch (...) {  // no memory for a message: TensorRT may not see an exception
        }
    }

    std::string take_errors() {
        std::lock_guard const guard(lock_);
        return errors_.empty() ? "no reason given" : std::exchange(errors_, {});
    }

private:
    std::mutex lock_;
    TensorRt::Log log_;
    std::string errors_;
};

}  // namespace

struct TensorRt::Library {
    explicit Library(Log log) : logger(std::move(log)), loaded(library_name(), install_hint()) {}

    Logger logger;
    SharedLibrary loaded;
};

namespace {

// Headers before TensorRT 10.16 do not have it.
template <typename Made>
auto set_communicator(Made& context, void* communicator, int) -> decltype(context.setCommunicator(communicator)) {
    return context.setCommunicator(communicator);
}
template <typename Made>
bool set_communicator(Made&, void*, long) {
    throw Error("this " + std::string(kProduct) + " takes no communicator", kProduct,
                "compile this program with the headers of TensorRT 11");
}

class Context final : public EngineContext {
public:
    Context(std::shared_ptr<void> keep, Logger& logger, std::unique_ptr<nvinfer1::IExecutionContext> context)
        : keep_(std::move(keep)), logger_(logger), context_(std::move(context)) {}

    void set_shape(std::string const& input, Shape const& shape) override {
        nvinfer1::Dims dims{};
        dims.nbDims = static_cast<int32_t>(shape.size());
        for (std::size_t i = 0; i < shape.size(); ++i) dims.d[i] = shape[i];
        check(context_->setInputShape(input.c_str(), dims), "setting the shape of " + input);
    }

    void bind(std::string const& tensor, cuda::Address address) override {
        check(context_->setTensorAddress(tensor.c_str(), reinterpret_cast<void*>(address)), "binding " + tensor);
    }

    void enqueue(cuda::Stream stream) override { check(context_->enqueueV3(stream), "running the engine"); }

    void join(void* communicator) override {
        check(set_communicator(*context_, communicator, 0), "setting the communicator");
    }

private:
    void check(bool done, std::string const& doing) {
        if (done) return;
        throw Error(doing + " failed: " + logger_.take_errors(), kProduct, "build the engine again with `gqa-export trt`");
    }

    std::shared_ptr<void> keep_;  // the library, runtime and engine outlive their contexts
    Logger& logger_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
};

// Destroyed from the last member to the first: engine, runtime, library.
struct Opened {
    std::shared_ptr<TensorRt::Library> library;
    std::unique_ptr<nvinfer1::IRuntime> runtime;
    std::unique_ptr<nvinfer1::ICudaEngine> engine;
};

class TensorRtEngine final : public Engine {
public:
    explicit TensorRtEngine(std::shared_ptr<Opened> opened) : opened_(std::move(opened)) {}

    std::vector<std::string> tensors() const override {
        std::vector<std::string> names;
        for (int32_t i = 0; i < opened_->engine->getNbIOTensors(); ++i) {
            names.emplace_back(opened_->engine->getIOTensorName(i));
        }
        return names;
    }

    std::unique_ptr<EngineContext> context(int profile, cuda::Stream stream) override {
        Logger& logger = opened_->library->logger;
        std::unique_ptr<nvinfer1::IExecutionContext> made(opened_->engine->createExecutionContext());
        if (!made || !made->setOptimizationProfileAsync(profile, stream)) {
            throw Error("cannot make an execution context: " + logger.take_errors(), kProduct,
                        "free GPU memory, or build the engine with a smaller --max-batch or --max-prompt");
        }
        return std::make_unique<Context>(opened_, logger, std::move(made));
    }

private:
    std::shared_ptr<Opened> opened_;
};

std::vector<char> read_file(std::string const& path) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    std::vector<char> data(file ? static_cast<std::size_t>(file.tellg()) : 0);
    file.seekg(0);
    if (!file.read(data.data(), static_cast<std::streamsize>(data.size()))) {
        throw Error("cannot read the engine", path, "check the bundle: copy it again");
    }
    return data;
}

// What the runtime will bind must be what the engine has.
void check_tensors(Engine const& engine, Manifest const& manifest, std::string const& path) {
    std::vector<std::string> expected;
    for (auto const* list : {&manifest.inputs, &manifest.outputs}) {
        for (TensorFact const& tensor : *list) expected.push_back(tensor.name);
    }
    std::vector<std::string> found = engine.tensors();
    std::sort(expected.begin(), expected.end());
    std::sort(found.begin(), found.end());
    if (found == expected) return;
    throw Error("the engine's inputs and outputs are not those of the manifest", path,
                "build the engine again with `gqa-export trt`");
}

}  // namespace

TensorRt::TensorRt(Log log) : library_(std::make_shared<Library>(std::move(log))) {}

std::string TensorRt::flavor() const { return kFlavor; }

std::string TensorRt::version() const {
    auto const part = [this](char const* name) {
        return std::to_string(library_->loaded.function<int32_t()>(name)());
    };
    return part("getInferLibMajorVersion") + "." + part("getInferLibMinorVersion") + "." +
           part("getInferLibPatchVersion");
}

std::unique_ptr<Engine> TensorRt::load(Manifest const& manifest, std::string const& folder,
                                       std::string const& plugin_library) const {
    std::string const path = folder + "/" + manifest.engine_file;
    Logger& logger = library_->logger;
    auto const create = library_->loaded.function<void*(void*, int32_t)>("createInferRuntime_INTERNAL");
    auto opened = std::make_shared<Opened>();
    opened->library = library_;
    opened->runtime.reset(static_cast<nvinfer1::IRuntime*>(create(&logger, NV_TENSORRT_VERSION)));
    if (!opened->runtime) throw Error("cannot start: " + logger.take_errors(), kProduct, install_hint());
    if (manifest.plugin && !opened->runtime->getPluginRegistry().loadLibrary(plugin_library.c_str())) {
        throw Error("cannot load the plugin library: " + logger.take_errors(), plugin_library,
                    "build it from plugins/cpp with the headers of this " + std::string(kProduct));
    }
    std::vector<char> const data = read_file(path);
    opened->engine.reset(opened->runtime->deserializeCudaEngine(data.data(), data.size()));
    if (!opened->engine) {
        throw Error("cannot open the engine: " + logger.take_errors(), path,
                    "build it again on this machine with `gqa-export trt`");
    }
    auto engine = std::make_unique<TensorRtEngine>(std::move(opened));
    check_tensors(*engine, manifest, path);
    return engine;
}

}  // namespace gqa
