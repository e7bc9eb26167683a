"""The sources that each patch was held against: place -> starts of their sha256, as they were read.
Written by `scripts/patch_digests.py`, after every patched function was read."""

ABSENT = ""
"""the place does not exist in some version that was read, and that version needs no patch there"""
SEEN: dict[str, tuple[str, ...]] = {
    "bart.modeling_bart:BartLearnedPositionalEmbedding.forward": ("57c3406c61fa", "7d212c786291"),
    "big_bird.modeling_big_bird:BigBirdSelfAttention.forward": ("37223c7629dc", "4db5db912b02"),
    "bigbird_pegasus.modeling_bigbird_pegasus:BigBirdPegasusLearnedPositionalEmbedding.forward":
        ("45558614c134", "03e4a5ebd886"),
    "blenderbot.modeling_blenderbot:BlenderbotLearnedPositionalEmbedding.forward": ("41fdd387f5d8", "06429e922439"),
    "blenderbot_small.modeling_blenderbot_small:BlenderbotSmallLearnedPositionalEmbedding.forward":
        ("41fdd387f5d8", "06429e922439"),
    "bloom.modeling_bloom:BloomAttention.forward": ("34225381cf82",),
    "camembert.modeling_camembert:CamembertEmbeddings.forward": ("192bcf96e9bb", "bb10e6668379", "4554ba7725b5"),
    "codegen.modeling_codegen:CodeGenAttention._attn": ("b340aeafc331", ""),
    "data2vec.modeling_data2vec_text:Data2VecTextEmbeddings.forward": ("192bcf96e9bb", "bb10e6668379", "4554ba7725b5"),
    "dbrx.modeling_dbrx:DbrxExperts.forward": ("acae1549e65b",),
    "deepseek_v2.modeling_deepseek_v2:DeepseekV2RotaryEmbedding.forward": ("98ec644a3de9", "2c9975fa13aa"),
    "deepseek_v2.modeling_deepseek_v2:apply_rotary_emb": ("b25d09c30045",),
    "diffllama.modeling_diffllama:DiffLlamaAttention.forward": ("013e7b260f5b", "2ef8df851741"),
    "falcon.modeling_falcon:FalconAttention.forward": ("5a79ce8af412",),
    "gemma3n.modeling_gemma3n:Gemma3nTextMLP._gaussian_topk": ("418754f8bfd4",),
    "gemma4.modeling_gemma4:Gemma4TextModel._maybe_slice_kv_shared_inputs": ("8afb4a068e2e", "", "5351cf32ff30"),
    "gemma4_unified.modeling_gemma4_unified:Gemma4UnifiedTextModel._maybe_slice_kv_shared_inputs":
        ("f6ba657c19b6", "", "4b780d12e1f4"),
    "gpt_neo.modeling_gpt_neo:GPTNeoSelfAttention._attn": ("c40796a749af",),
    "gpt_neox_japanese.modeling_gpt_neox_japanese:GPTNeoXJapaneseAttention._attn": ("454d79e6355d",),
    "gptj.modeling_gptj:GPTJAttention._attn": ("94b498d6828f", ""),
    "jetmoe.modeling_jetmoe:JetMoeMoA.map": ("3263d7e07180",),
    "jetmoe.modeling_jetmoe:JetMoeMoA.reduce": ("f8e309330b15",),
    "jetmoe.modeling_jetmoe:JetMoeMoE.forward": ("8175d8c8fa24",),
    "llama4.modeling_llama4:Llama4TextAttention.forward": ("9183617f4031",),
    "llama4.modeling_llama4:Llama4TextRotaryEmbedding.forward": ("2c9975fa13aa",),
    "llama4.modeling_llama4:apply_rotary_emb": ("294e060528a9",),
    "longcat_flash.modeling_longcat_flash:LongcatFlashExperts.forward": ("d59d2a7326e9",),
    "marian.modeling_marian:MarianSinusoidalPositionalEmbedding.forward": ("fb59f370f872", "6307e1e648a1"),
    "mbart.modeling_mbart:MBartLearnedPositionalEmbedding.forward": ("57c3406c61fa", "7d212c786291"),
    "megatron_bert.modeling_megatron_bert:MegatronBertSelfAttention.forward":
        ("3d6506154e76", "222e1db0aebc", "12dd72a5c5d5"),
    "mpt.modeling_mpt:MptAttention.forward": ("c38160120bf5", "acd08620f748"),
    "mvp.modeling_mvp:MvpAttention.forward": ("7a88e4885d0d", "510c1b5f2452"),
    "mvp.modeling_mvp:MvpLearnedPositionalEmbedding.forward": ("57c3406c61fa", "7d212c786291"),
    "pegasus.modeling_pegasus:PegasusSinusoidalPositionalEmbedding.forward": ("fb59f370f872", "6307e1e648a1"),
    "plbart.modeling_plbart:PLBartLearnedPositionalEmbedding.forward": ("57c3406c61fa", "7d212c786291"),
    "rembert.modeling_rembert:RemBertSelfAttention.forward": ("e7d449783b3e", "8bfe0e96b8e1", "3640bdb35aab"),
    "roberta.modeling_roberta:RobertaEmbeddings.forward": ("192bcf96e9bb", "bb10e6668379", "4554ba7725b5"),
    "roberta_prelayernorm.modeling_roberta_prelayernorm:RobertaPreLayerNormEmbeddings.forward":
        ("192bcf96e9bb", "bb10e6668379", "4554ba7725b5"),
    "roformer.modeling_roformer:RoFormerSelfAttention.forward": ("48ced5fb3d5d", "1f1d988992c8"),
    "roformer.modeling_roformer:RoFormerSinusoidalPositionalEmbedding.forward": ("fb59f370f872", "6307e1e648a1"),
    "trocr.modeling_trocr:TrOCRAttention.forward": ("571f354bbe1f", "084ddf1e40f1"),
    "trocr.modeling_trocr:TrOCRLearnedPositionalEmbedding.forward": ("57c3406c61fa", "7d212c786291"),
    "whisper.modeling_whisper:WhisperPositionalEmbedding.forward": ("5df53f3ab349", "68357edfc53c"),
    "xglm.modeling_xglm:XGLMAttention.forward": ("214633c2552a", "80931b935382"),
    "xlm_roberta.modeling_xlm_roberta:XLMRobertaEmbeddings.forward": ("192bcf96e9bb", "bb10e6668379", "4554ba7725b5"),
    "xlm_roberta_xl.modeling_xlm_roberta_xl:XLMRobertaXLEmbeddings.forward":
        ("b1d6d2d4dfb6", "e65846ef4464", "156639f03026"),
    "xmod.modeling_xmod:XmodEmbeddings.forward": ("192bcf96e9bb", "bb10e6668379", "4554ba7725b5"),
    "xmod.modeling_xmod:XmodEncoder.forward": ("d5db68c3d7c1",),
    "xmod.modeling_xmod:XmodOutput.lang_adapter": ("ae614613a447",),
}
