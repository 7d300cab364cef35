"""Forms that the output must follow, in the names that SGLang, OpenAI and vLLM gave them; `grammar` holds to them.

A request has one form at most.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fullarc.chat.errors import refusal
from fullarc.chat.grammar import MAX_TEXT, Grammar, choice_grammar, json_grammar, read_format, tags_grammar
from fullarc.chat.openai import BadRequest

Text = Annotated[str, Field(max_length=MAX_TEXT)]
Schema = Text | dict[str, Any]
Options = Annotated[list[Text], Field(max_length=4096)]


class GrammarBody(BaseModel):
    """SGLang's names."""

    json_schema: Schema | None = None
    regex: Text | None = None
    ebnf: Text | None = None
    structural_tag: Schema | None = None

    @property
    def formed(self) -> bool:
        """Whether there is a form to be compiled, which takes time."""
        forms = (self.json_schema, self.regex, self.ebnf, self.structural_tag)
        return any(value is not None for value in forms)

    def grammar(self) -> Grammar | None:
        """The form. Raises BadRequest where it is none, or one of several."""
        found = [grammar for grammar in self.grammars() if grammar]
        if len(found) > 1:
            both = " and ".join(grammar.name for grammar in found[:2])
            raise BadRequest(f"{both} contradict each other: give one form.", found[1].name)
        return found[0] if found else None

    def grammars(self) -> list[Grammar | None]:
        """All that are given."""
        return [
            _made(json_grammar, self.json_schema, "json_schema"),
            _made(_regex, self.regex, "regex"),
            _made(_ebnf, self.ebnf, "ebnf"),
            _made(tags_grammar, self.structural_tag, "structural_tag"),
        ]


class StructuredOutputs(BaseModel):
    """vLLM's `structured_outputs`."""

    model_config = ConfigDict(extra="forbid")

    schema_: Schema | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Options | None = None
    grammar: Text | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: Text | None = None
    structural_tag: Schema | None = None
    # refused unless neutral
    disable_additional_properties: Literal[False, None] = None

    def grammars(self, name: str = "structured_outputs") -> list[Grammar | None]:
        """All that are given."""
        spaces: dict[str, Any] = {}
        if self.whitespace_pattern is not None:
            spaces = {"whitespace_pattern": self.whitespace_pattern}
        if self.disable_any_whitespace:
            spaces = {"whitespace_pattern": None, "whitespace_flexible": False}
        return [
            _made(lambda given, where: json_grammar(given, where, **spaces), self.schema_, f"{name}.json"),
            _made(_regex, self.regex, f"{name}.regex"),
            _made(choice_grammar, self.choice, f"{name}.choice"),
            _made(_ebnf, self.grammar, f"{name}.grammar"),
            _made(tags_grammar, self.structural_tag, f"{name}.structural_tag"),
            json_grammar({"type": "object"}, f"{name}.json_object", **spaces) if self.json_object else None,
        ]


class OpenAIGrammarBody(GrammarBody):
    """OpenAI's name, vLLM's, old and new, and SGLang's."""

    response_format: dict[str, Any] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Text | None = None
    guided_choice: Options | None = None
    guided_grammar: Text | None = None

    @property
    def formed(self) -> bool:
        """Whether there is a form to be compiled, which takes time."""
        guided = (self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        others = (self.response_format, self.structured_outputs, *guided)
        return super().formed or any(value is not None for value in others)

    def grammars(self) -> list[Grammar | None]:
        """All that are given."""
        return [
            *super().grammars(),
            read_format(self.response_format, "response_format"),
            *(self.structured_outputs.grammars() if self.structured_outputs else ()),
            _made(json_grammar, self.guided_json, "guided_json"),
            _made(_regex, self.guided_regex, "guided_regex"),
            _made(choice_grammar, self.guided_choice, "guided_choice"),
            _made(_ebnf, self.guided_grammar, "guided_grammar"),
        ]


def read_form(body: Mapping[str, Any]) -> Grammar | None:
    """The form that a request in OpenAI's dialect asks for. Raises BadRequest."""
    try:
        return OpenAIGrammarBody.model_validate(body).grammar()
    except ValidationError as error:
        raise refusal(error) from None


def _made(make: Callable[[Any, str], Grammar], value: Any, name: str) -> Grammar | None:
    return None if value is None else make(value, name)


def _regex(text: str, name: str) -> Grammar:
    return Grammar("regex", text, name)


def _ebnf(text: str, name: str) -> Grammar:
    return Grammar("ebnf", text, name)
