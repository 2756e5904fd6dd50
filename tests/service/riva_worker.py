"""Runs NVIDIA's own client against a server and prints what it got as JSON. Needs nvidia-riva-client, nothing of ours.

python riva_worker.py HOST:PORT AUDIO
"""

from __future__ import annotations

import json
import sys
from typing import Any

import grpc
import riva.client
import riva.client.proto.riva_asr_pb2 as rasr

TYPES = ("StreamingRecognizeRequest", "RecognizeRequest", "RecognitionConfig", "StreamingRecognitionConfig")
TYPES += ("SpeechContext", "EndpointingConfig", "SpeakerDiarizationConfig", "RivaSpeechRecognitionConfigRequest")
TYPES += ("RecognizeResponse", "SpeechRecognitionResult", "SpeechRecognitionAlternative", "WordInfo")
TYPES += ("StreamingRecognizeResponse", "StreamingRecognitionResult")


def fields() -> dict[str, dict[str, list[int]]]:
    """Name -> field -> number and type of Riva's messages."""
    described = {name: rasr.DESCRIPTOR.message_types_by_name[name] for name in TYPES}
    return {
        name: {field.name: [field.number, field.type] for field in message.fields} for name, message in described.items()
    }


def words_of(alternative: Any) -> list[tuple[str, int, int]]:
    return [(word.word, word.start_time, word.end_time) for word in alternative.words]


def stream(service: Any, path: str, **config: Any) -> dict[str, Any]:
    """As NVIDIA's transcribe_file.py does it: the whole file, header first, neither encoding nor rate set."""
    inner = riva.client.RecognitionConfig(language_code="en-US", enable_word_time_offsets=True, **config)
    settings = riva.client.StreamingRecognitionConfig(config=inner, interim_results=True)
    riva.client.add_word_boosting_to_config(settings, ["zebra"], 4.0)
    finals, interims, words = [], 0, []
    with riva.client.AudioChunkFileIterator(path, 1600) as chunks:
        for response in service.streaming_response_generator(chunks, settings):
            for result in response.results:
                interims += not result.is_final
                if result.is_final:
                    finals.append(result.alternatives[0].transcript)
                    words += words_of(result.alternatives[0])
    return {"text": "".join(finals).strip(), "interims": interims, "words": words}


def failure(call: Any) -> str | None:
    try:
        call()
    except grpc.RpcError as error:
        return str(error.code().name)
    return None


def main(address: str, path: str) -> None:
    service = riva.client.ASRService(riva.client.Auth(uri=address))
    with open(path, "rb") as file:
        audio = file.read()
    offline = service.offline_recognize(audio, riva.client.RecognitionConfig(enable_word_time_offsets=True))
    request = rasr.RivaSpeechRecognitionConfigRequest()
    models = service.stub.GetRivaSpeechRecognitionConfig(request).model_config
    print(
        json.dumps(
            {
                "fields": fields(),
                "streaming": stream(service, path),
                "offline": {
                    "text": "".join(result.alternatives[0].transcript for result in offline.results).strip(),
                    "words": [word for result in offline.results for word in words_of(result.alternatives[0])],
                },
                "models": [(model.model_name, dict(model.parameters)) for model in models],
                "errors": {
                    "model": failure(lambda: stream(service, path, model="other")),
                    "budget": failure(
                        lambda: stream(service, path, custom_configuration={"compute_budget": "0.001"})
                    ),
                    "rate": failure(
                        lambda: service.offline_recognize(audio, riva.client.RecognitionConfig(sample_rate_hertz=4000))
                    ),
                },
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
