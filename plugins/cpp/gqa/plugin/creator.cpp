#include "gqa/plugin/creator.h"

#include <string>
#include <utility>

#include "gqa/plugin/attention_plugin.h"
#include "gqa/plugin/log.h"

namespace gqa::plugin {

AttentionCreator::AttentionCreator(std::int32_t version)
    : version_(version), fields_(creation_fields(version)), names_{static_cast<int32_t>(fields_.size()), fields_.data()} {}

nvinfer1::IPluginV3* AttentionCreator::createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
                                                    nvinfer1::TensorRTPhase phase) noexcept {
    std::string const layer = name ? name : "";
    return guarded<nvinfer1::IPluginV3*>(("layer " + layer).c_str(), nullptr, [&] {
        State state;
        state.building = phase == nvinfer1::TensorRTPhase::kBUILD;
        if (state.building) {
            state.layer = read_attributes(*fields, version_);
            state.carriers = carriers_;
            state.kernels = BuildKernels::from_environment();
        } else {
            Serialized read = read_serialized(*fields, version_);
            if (!read.container.empty()) {
                CubinStore::of_process().add(read.container);
                state.container = std::make_shared<std::string const>(std::move(read.container));
            }
            state.layer = read.layer;
            state.keys = std::move(read.keys);
        }
        return new AttentionPlugin(std::move(state));
    });
}

}  // namespace gqa::plugin

// What TensorRT looks up in a plugin library.
#define GQA_EXPORT extern "C" __attribute__((visibility("default")))

GQA_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { gqa::plugin::set_logger_finder(finder); }

GQA_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static gqa::plugin::AttentionCreator first(1), second(2), third(3);
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&first, &second, &third};
    count = 3;
    return creators;
}
