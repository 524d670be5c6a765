from autoglm.errors import MAX_SHOWN, ErrorCode, Exact, RequestError, invalid, shorten


def test_every_code_has_an_http_status_and_a_triton_code() -> None:
    for code in ErrorCode:
        assert 400 <= code.http_status < 600
        assert code.triton_name.isupper()
    assert (ErrorCode.INVALID_ARGUMENT.http_status, ErrorCode.INVALID_ARGUMENT.triton_name) == (400, "INVALID_ARG")
    assert ErrorCode.CANCELLED.triton_name == "CANCELLED"


def test_the_default_code_blames_the_caller() -> None:
    assert RequestError("x").code is ErrorCode.INVALID_ARGUMENT
    assert str(RequestError("x", ErrorCode.INTERNAL)) == "x"


def test_a_message_names_field_value_and_what_is_allowed() -> None:
    assert invalid("top_p", 7, "0 to 1").message == "top_p: got 7; allowed: 0 to 1"
    assert invalid("role", "robot", "user").message == "role: got 'robot'; allowed: user"
    assert invalid("IMAGES", Exact("3 images"), "2").message == "IMAGES: got 3 images; allowed: 2"


def test_long_values_are_cut() -> None:
    assert len(shorten("x" * 10**7)) == MAX_SHOWN
    assert shorten("x" * 10**7).endswith("...")
    assert shorten("a\nb") == "'a\\nb'"
    assert shorten(b"\x89PNG") == "4 bytes"
    assert len(shorten(list(range(1000)))) == MAX_SHOWN
