"""Runs NVIDIA's own Riva client against a server; prints one JSON object a line. Needs it, and nothing of ours.

python riva_client.py HOST:PORT AUDIO...

The first line is about the client and the server: Riva's message fields, the models listed, the status of provoked
errors. Then one line for each file, recognised as a stream and in one call.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import grpc
import riva.client
import riva.client.proto.riva_asr_pb2 as rasr

MESSAGES = (
    "StreamingRecognizeRequest RecognizeRequest RecognitionConfig StreamingRecognitionConfig SpeechContext "
    "EndpointingConfig SpeakerDiarizationConfig RivaSpeechRecognitionConfigRequest RecognizeResponse "
    "SpeechRecognitionResult SpeechRecognitionAlternative WordInfo StreamingRecognizeResponse "
    "StreamingRecognitionResult"
)


def fields() -> dict[str, dict[str, list[int]]]:
    """Message -> field -> number and type."""
    described = {name: rasr.DESCRIPTOR.message_types_by_name[name] for name in MESSAGES.split()}
    return {name: {field.name: [field.number, field.type] for field in kind.fields} for name, kind in described.items()}


def words_of(alternative: Any) -> list[tuple[str, int, int]]:
    """Text, start and end of every word, in milliseconds."""
    return [(word.word, word.start_time, word.end_time) for word in alternative.words]


def stream(service: Any, path: str, boosted: list[str] | None = None, **config: Any) -> dict[str, Any]:
    """As NVIDIA's transcribe_file.py does it: the whole file, header first, neither encoding nor rate set."""
    inner = riva.client.RecognitionConfig(language_code="en-US", enable_word_time_offsets=True, **config)
    settings = riva.client.StreamingRecognitionConfig(config=inner, interim_results=True)
    riva.client.add_word_boosting_to_config(settings, boosted, 4.0)
    finals, interims, words = [], 0, []
    with riva.client.AudioChunkFileIterator(path, 1600) as chunks:
        for response in service.streaming_response_generator(chunks, settings):
            for result in response.results:
                interims += not result.is_final
                if result.is_final:
                    finals.append(result.alternatives[0].transcript)
                    words += words_of(result.alternatives[0])
    return {"text": "".join(finals).strip(), "interims": interims, "words": words}


def recognize(service: Any, path: str, **config: Any) -> dict[str, Any]:
    """As NVIDIA's transcribe_file_offline.py does it: the whole file in one message."""
    with open(path, "rb") as file:
        response = service.offline_recognize(
            file.read(), riva.client.RecognitionConfig(enable_word_time_offsets=True, **config)
        )
    return {
        "text": "".join(result.alternatives[0].transcript for result in response.results).strip(),
        "words": [word for result in response.results for word in words_of(result.alternatives[0])],
    }


def failure(call: Any) -> str | None:
    """The status that a call ends with as a grpc.RpcError; None when it does not."""
    try:
        call()
    except grpc.RpcError as error:
        return str(error.code().name)
    return None


def main(address: str, *paths: str) -> None:
    """Writes the lines."""
    service = riva.client.ASRService(riva.client.Auth(uri=address))
    request = rasr.RivaSpeechRecognitionConfigRequest()
    models = service.stub.GetRivaSpeechRecognitionConfig(request).model_config
    errors = {
        "model": failure(lambda: stream(service, paths[0], model="other")),
        "language": failure(lambda: recognize(service, paths[0], language_code="de-DE")),
        "budget": failure(lambda: stream(service, paths[0], custom_configuration={"compute_budget": "0.001"})),
        "rate": failure(lambda: recognize(service, paths[0], sample_rate_hertz=4000)),
    }
    about = {
        "fields": fields(),
        "models": [(model.model_name, dict(model.parameters)) for model in models],
        "errors": errors,
        "boosted": stream(service, paths[0], boosted=["zebra"])["text"],
    }
    print(json.dumps(about), flush=True)
    for path in paths:
        line = {"path": path, "streaming": stream(service, path), "offline": recognize(service, path)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
