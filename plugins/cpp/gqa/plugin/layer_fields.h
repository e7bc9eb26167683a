// TensorRT's plugin fields <-> a layer. Layout: plugins/grouped_attention/fields.py.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

#include "gqa/attention/container.h"
#include "gqa/attention/layer.h"

namespace gqa::plugin {

// A restored layer. `container` is what it carried, empty for all layers but one.
struct Serialized {
    Layer layer;
    std::vector<Key> keys;
    std::string container;
};

// From the attributes of an ONNX node. Throws Error for a field that is missing, unknown or out of range.
Layer read_attributes(nvinfer1::PluginFieldCollection const& fields, std::int32_t version);

// From an engine. Throws Error.
Serialized read_serialized(nvinfer1::PluginFieldCollection const& fields, std::int32_t version);

// The creation fields' names and kinds, for the creator.
std::vector<nvinfer1::PluginField> creation_fields(std::int32_t version);

// Owns what it describes: TensorRT reads the fields after the call that returns them.
class FieldsToSerialize {
public:
    nvinfer1::PluginFieldCollection const* describe(Layer const& layer, std::vector<Key> const& keys,
                                                    std::string container);

private:
    Layer layer_;
    std::int32_t contract_ = 0;
    std::string keys_, container_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_;
};

}  // namespace gqa::plugin
