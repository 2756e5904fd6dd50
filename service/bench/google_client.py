"""Runs Google's own Speech-to-Text client against a server; prints one JSON object a line.

Needs that client, and nothing of ours.

python google_client.py HOST:PORT AUDIO...

The first line is about the client and the server: Google's message fields and enums, what a single utterance and a
long-running request end with, the status of provoked errors. Then one line for each file, recognised as a stream and in
one call.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from typing import Any

import grpc
from google.api_core.exceptions import GoogleAPICallError
from google.cloud import speech


def wire_facts() -> dict[str, dict[str, Any]]:
    """Message -> field -> number and type; message.enum -> value -> number."""
    facts: dict[str, dict[str, Any]] = {}
    for name, kind in speech.RecognizeRequest.pb().DESCRIPTOR.file.message_types_by_name.items():
        facts[name] = {field.name: [field.number, field.type] for field in kind.fields}
        for enum in kind.enum_types:
            facts[f"{name}.{enum.name}"] = {value.name: value.number for value in enum.values}
    return facts


def words_of(alternative: Any) -> list[tuple[str, float, float]]:
    """Text, start and end of every word, in milliseconds."""
    ms = timedelta(milliseconds=1)
    return [(word.word, word.start_time / ms, word.end_time / ms) for word in alternative.words]


def settings(**config: Any) -> speech.RecognitionConfig:
    """Neither encoding nor rate: the file says what it is."""
    return speech.RecognitionConfig({"language_code": "en-US", "enable_word_time_offsets": True} | config)


def stream(client: speech.SpeechClient, path: str, single_utterance: bool = False, **config: Any) -> dict[str, Any]:
    """As Google's transcribe_streaming.py does it: the whole file, header first, in many messages."""
    streaming = speech.StreamingRecognitionConfig(
        config=settings(**config), interim_results=True, single_utterance=single_utterance
    )
    with open(path, "rb") as file:
        content = file.read()
    requests = (
        speech.StreamingRecognizeRequest(audio_content=content[start : start + 3200])
        for start in range(0, len(content), 3200)
    )
    finals, interims, words, events = [], 0, [], []
    for response in client.streaming_recognize(config=streaming, requests=requests):
        if response.speech_event_type:
            events.append(response.speech_event_type.name)
        for result in response.results:
            interims += not result.is_final
            if result.is_final:
                finals.append(result.alternatives[0].transcript)
                words += words_of(result.alternatives[0])
    return {"text": "".join(finals), "finals": len(finals), "interims": interims, "words": words, "events": events}


def recognize(client: speech.SpeechClient, path: str, metadata: Any = (), **config: Any) -> dict[str, Any]:
    """As Google's transcribe_sync.py does it: the whole file in one message."""
    with open(path, "rb") as file:
        audio = speech.RecognitionAudio(content=file.read())
    response = client.recognize(config=settings(**config), audio=audio, metadata=metadata)
    return {
        "text": "".join(result.alternatives[0].transcript for result in response.results),
        "words": [word for result in response.results for word in words_of(result.alternatives[0])],
    }


def failure(call: Any) -> str | None:
    """The status that a call ends with as a GoogleAPICallError; None when it does not."""
    try:
        call()
    except GoogleAPICallError as error:
        return str(error.grpc_status_code.name)
    return None


def main(address: str, *paths: str) -> None:
    """Writes the lines."""
    transport = speech.SpeechClient.get_transport_class("grpc")(channel=grpc.insecure_channel(address))
    client, first = speech.SpeechClient(transport=transport), paths[0]
    uri = speech.RecognitionAudio(uri="gs://bucket/talk.wav")
    errors = {
        "model": failure(lambda: stream(client, first, model="other")),
        "language": failure(lambda: recognize(client, first, language_code="de-DE")),
        "budget": failure(lambda: recognize(client, first, metadata=[("x-compute-budget", "0.001")])),
        "rate": failure(lambda: stream(client, first, sample_rate_hertz=4000)),
        "uri": failure(lambda: client.recognize(config=settings(), audio=uri)),
    }
    hints = [speech.SpeechContext(phrases=["zebra"], boost=4.0)]
    about = {
        "facts": wire_facts(),
        "errors": errors,
        "long_running": failure(lambda: client.long_running_recognize(config=settings(), audio=uri)),
        "single_utterance": stream(client, first, single_utterance=True),
        "boosted": stream(client, first, speech_contexts=hints)["text"],
    }
    print(json.dumps(about), flush=True)
    for path in paths:
        line = {"path": path, "streaming": stream(client, path), "offline": recognize(client, path)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
