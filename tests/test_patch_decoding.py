"""Decoding around a patched model: compiled steps, quantised caches, streams, processors, loops of one's own."""

import pytest
import torch
from models_zoo import assert_close, make_batch, make_model, make_prefix
from seq2seq_zoo import make_seq2seq, make_seq2seq_batch, make_site_prefix

from prefix_fast.patching import patch

P, NEW = 5, 6
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 2}


def make_patched(family):
    model = make_model(family)
    return patch(model, make_prefix(model, P))


@pytest.fixture
def compiled():
    """Compiles a forward to one graph; after `.freeze()`, a second compilation raises."""
    import torch._dynamo as dynamo

    dynamo.reset()

    class Compiled:
        def __call__(self, model):
            return torch.compile(model.forward, fullgraph=True, backend="aot_eager", dynamic=False)

        def freeze(self):
            dynamo.config.error_on_recompile = True

    yield Compiled()
    dynamo.config.error_on_recompile = False
    dynamo.reset()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_compiled_step_decodes_every_token_with_one_graph(family, compiled):
    from transformers import StaticCache

    model, batch = make_patched(family), make_batch("none", rows=2)
    expected = model.generate(batch.input_ids, **GREEDY)
    cache, step = StaticCache(config=model.config, max_cache_len=32), compiled(model)
    length = batch.input_ids.shape[1]
    with torch.no_grad():
        logits = model(batch.input_ids, past_key_values=cache, use_cache=True).logits
        tokens = [batch.input_ids, logits[:, -1:].argmax(-1)]
        for number in range(NEW - 1):
            if number == 2:
                compiled.freeze()
            position = torch.full((2, 1), length + number)
            logits = step(tokens[-1], past_key_values=cache, use_cache=True, position_ids=position).logits
            tokens.append(logits.argmax(-1))
    assert torch.equal(torch.cat(tokens, 1), expected)


def test_a_compiled_step_of_an_encoder_decoder_decodes_with_one_graph(compiled):
    from transformers import EncoderDecoderCache, StaticCache

    model = make_seq2seq("bart")
    patch(model, make_site_prefix(model, P))
    batch = make_seq2seq_batch("none")
    states = (model.get_encoder()(batch.input_ids)[0].detach(),)
    caches = [StaticCache(config=model.config, max_cache_len=n) for n in (16, batch.input_ids.shape[1])]
    cache, step = EncoderDecoderCache(*caches), compiled(model)
    tokens = batch.labels.clamp(min=3)
    with torch.no_grad():
        expected = model(encoder_outputs=states, decoder_input_ids=tokens, use_cache=False).logits
        whole = []
        for number in range(tokens.shape[1]):
            if number == 3:
                compiled.freeze()
            run = step if number else model
            given = {"encoder_outputs": states, "decoder_input_ids": tokens[:, number : number + 1]}
            whole.append(run(**given, past_key_values=cache, use_cache=True).logits)
    assert_close(torch.cat(whole, 1), expected)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_a_quantised_cache_holds_the_rows_own_tokens_alone(family):
    from transformers.cache_utils import Cache, QuantizedLayer

    class Rounded(QuantizedLayer):
        """Keeps old tokens as int8 with a scale for each row of numbers."""

        def _quantize(self, tensor, axis):
            scale = tensor.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 127
            return (tensor / scale).round().to(torch.int8), scale

        def _dequantize(self, kept):
            return kept[0].float() * kept[1]

    model, batch = make_patched(family), make_batch("none", rows=2)
    cache = Cache(layers=[Rounded(residual_length=4) for _ in range(model.config.num_hidden_layers)])
    with torch.no_grad():
        expected = model(batch.input_ids).logits
        parts, ids = [], batch.input_ids
        for step in (ids[:, :5], *ids[:, 5:].split(1, 1)):
            parts.append(model(step, past_key_values=cache, use_cache=True).logits)
    assert_close(torch.cat(parts, 1), expected, 0.05)
    assert cache.get_seq_length() == ids.shape[1]


def test_tokens_are_streamed_as_they_come():
    from transformers.generation.streamers import BaseStreamer

    class Kept(BaseStreamer):
        tokens, ended = (), False

        def put(self, value):
            self.tokens += tuple(value.flatten().tolist())

        def end(self):
            self.ended = True

    model, batch, streamer = make_patched("llama"), make_batch("none", rows=1), Kept()
    tokens = model.generate(batch.input_ids, streamer=streamer, **GREEDY)
    assert streamer.ended and streamer.tokens == tuple(tokens.flatten().tolist())


@pytest.mark.parametrize("beams", [1, 3])
def test_processors_and_criteria_see_the_own_tokens_alone(beams):
    from transformers import LogitsProcessor, StoppingCriteria

    lengths = set()

    class Even(LogitsProcessor):
        def __call__(self, input_ids, scores):
            lengths.add(input_ids.shape[1])
            odd = torch.arange(scores.shape[-1]) % 2 == 1
            return scores.masked_fill(odd, float("-inf"))

    class Enough(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 12)

    model, batch = make_patched("gpt2"), make_batch("left")
    options = {**GREEDY, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "num_beams": beams}
    options.update(logits_processor=[Even()], stopping_criteria=[Enough()])
    tokens = model.generate(batch.input_ids, attention_mask=batch.attention_mask, **options)
    assert tokens.shape[1] == 12 and not (tokens[:, 9:] % 2).any()
    assert lengths == {9, 10, 11}


def test_a_decoding_loop_of_ones_own_gets_prefix_and_cache():
    """As contrastive search and group beams are, which transformers now loads as functions."""

    def lookahead(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        # Each step takes, of the two best tokens, the one whose hidden state differs most from those before it.
        while not bool(stopping_criteria(input_ids, None).all()):
            states = model(input_ids, output_hidden_states=True, use_cache=False)
            best = states.logits[:, -1].topk(2).indices
            pair = torch.cat([input_ids.repeat_interleave(2, 0), best.reshape(-1, 1)], 1)
            hidden = model(pair, output_hidden_states=True, use_cache=False).hidden_states[-1]
            likeness = torch.cosine_similarity(hidden[:, -1:], hidden[:, :-1], dim=-1).amax(1).reshape(-1, 2)
            input_ids = torch.cat([input_ids, best.gather(1, likeness.argmin(1, keepdim=True))], 1)
        return input_ids

    model, batch = make_patched("llama"), make_batch("none", rows=2)
    plain = make_model("llama")
    found = model.generate(batch.input_ids, custom_generate=lookahead, max_new_tokens=4, pad_token_id=2)
    without = plain.generate(batch.input_ids, custom_generate=lookahead, max_new_tokens=4, pad_token_id=2)
    assert found.shape == without.shape and not torch.equal(found, without)
    model.eval()
    first = model(found[:, :-1]).logits[:, 8:]
    chosen = found[:, 9:]
    assert all(
        c in t for c, t in zip(chosen.flatten().tolist(), first.topk(2).indices.flatten(0, 1).tolist(), strict=True)
    )


def test_continuous_batching_is_refused_with_the_reason():
    from transformers import GenerationConfig

    model, batch = make_patched("llama"), make_batch("none", rows=2)
    config = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=2, eos_token_id=1)
    with pytest.raises((ValueError, NotImplementedError), match="prefix_fast is not supported for continuous batching"):
        model.generate_batch(inputs=batch.input_ids.tolist(), generation_config=config)
