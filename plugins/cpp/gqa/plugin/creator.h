// Makes attention plugins: from an ONNX node's attributes while an engine is built, from its fields when it is loaded.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <vector>

#include "gqa/attention/layer.h"
#include "gqa/plugin/build_kernels.h"

namespace gqa::plugin {

class AttentionCreator final : public nvinfer1::IPluginCreatorV3One {
public:
    explicit AttentionCreator(std::int32_t version);

    nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &names_; }
    char const* getPluginName() const noexcept override { return kPluginName; }
    char const* getPluginVersion() const noexcept override { return version_text(version_); }
    char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

private:
    std::int32_t version_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection names_;
    std::shared_ptr<Carriers> carriers_ = std::make_shared<Carriers>();
};

}  // namespace gqa::plugin
