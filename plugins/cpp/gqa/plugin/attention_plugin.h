// The TensorRT plugin gqa::GroupedQueryAttention, versions 1 to 3: one attention layer.
//
// The same plugin as plugins/grouped_attention/tensorrt.py: an engine built with either runs with either. fp16, bf16 or
// fp32 for everything but the lengths (int32), the tables of version 2 (int32, fp32) and the cache of version 3 (int8 or
// fp8), linear layout; present_key and present_value are the memory of the past.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gqa/attention/layer.h"
#include "gqa/attention/loaded_kernels.h"
#include "gqa/plugin/build_kernels.h"
#include "gqa/plugin/layer_fields.h"

namespace gqa::plugin {

// What a clone shares with its original.
struct State {
    Layer layer;
    std::vector<Key> keys;
    std::shared_ptr<BuildKernels const> kernels;   // while building
    std::shared_ptr<Carriers> carriers;            // while building
    std::shared_ptr<std::string const> container;  // of a restored layer that carries the kernels of its engine
    bool building = false;
};

class AttentionPlugin final : public nvinfer1::IPluginV3,
                              public nvinfer1::IPluginV3OneCore,
                              public nvinfer1::IPluginV3OneBuildV2,
                              public nvinfer1::IPluginV3OneRuntime {
public:
    explicit AttentionPlugin(State state);

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    char const* getPluginName() const noexcept override { return kPluginName; }
    char const* getPluginVersion() const noexcept override { return version_text(state_.layer.version); }
    char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

    int32_t getNbOutputs() const noexcept override { return node_outputs(state_.layer); }
    int32_t getAliasedInput(int32_t output) noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count, nvinfer1::DataType const* inputs,
                               int32_t input_count) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t input_count, nvinfer1::DimsExprs const*, int32_t,
                            nvinfer1::DimsExprs* outputs, int32_t output_count,
                            nvinfer1::IExprBuilder& build) noexcept override;
    bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors,
                                   int32_t input_count, int32_t output_count) noexcept override;
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count,
                            nvinfer1::DynamicPluginTensorDesc const*, int32_t) noexcept override;
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count,
                            nvinfer1::DynamicPluginTensorDesc const*, int32_t) const noexcept override;

    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* inputs, int32_t input_count,
                          nvinfer1::PluginTensorDesc const*, int32_t) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* input_descs, nvinfer1::PluginTensorDesc const*,
                    void const* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

private:
    Sizes sizes_of(nvinfer1::Dims const* dims, nvinfer1::DataType type) const;
    Sizes largest(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count) const;
    Sizes current(nvinfer1::PluginTensorDesc const* inputs) const;
    void load(Sizes const& sizes);
    std::string carried();

    State state_;
    std::vector<Input> inputs_;
    std::unique_ptr<LoadedLayer> loaded_;
    std::optional<bool> carries_;  // while building: the same answer until the layer is configured again
    FieldsToSerialize fields_;
};

}  // namespace gqa::plugin
