"""Addresses with a secret in every spelling that users, typing mistakes and servers come up with."""

SECRET = "Zq7kSecret"

_LOGINS = (
    # In front of the host, as a password or a token, with every mark that ends something elsewhere.
    *(f"me:{SECRET}", SECRET, f":{SECRET}", f"me:{SECRET}:{SECRET}", f"me:%41{SECRET}%40"),
    *(f"me:{SECRET}{mark}{SECRET}" for mark in "@\"'<>/?#\\`[]&=;, {|"),
    *(f"me:{SECRET})({SECRET}", f"me:12{SECRET}"),
)
_MISTAKES = (
    *(f"http://me:{SECRET}@host:80a/", f"http://me:{SECRET}@host:99999/", f"http://me:{SECRET}@"),
    *(f"http://:{SECRET}@/x", f"http://me:{SECRET}@[::1", f"ftp://me:{SECRET}@host/", f"htp://me:{SECRET}@host/"),
    *(f"http:/me:{SECRET}@host/", f"http:me:{SECRET}@host/", f"http:///me:{SECRET}@host/", f"//me:{SECRET}@host/"),
    *(f"me:{SECRET}@host:8000/", f"http://me:{SECRET}", f"http://me:{SECRET}/x", f"HTTP://me:{SECRET}@host"),
    *(f"http://me:{SECRET}@host\N{FULLWIDTH SOLIDUS}x/", f"http:\\/\\/me:{SECRET}@host\\/x"),
)
_NAMES = ("token", "pwd", "pass", "code", "bearer", "api_key", "X-Amz-Signature", "k", "whatever", "token[]")
_ENDS = (
    *(f"?{name}={SECRET}" for name in _NAMES),
    *(f"?n=1&key={SECRET}&m=2", f"?a=1;key={SECRET}", f"?a=1&amp;token={SECRET}", f"?{SECRET}", f";token={SECRET}"),
    *(f"?token={SECRET}<{SECRET}", f'?token={SECRET}"{SECRET}', f"?version=1&t={SECRET}%20{SECRET}"),
    *(f"#token={SECRET}", f"#{SECRET}", f"x?y#access_token={SECRET}&z=1"),
)
ADDRESSES = (*(f"http://{login}@host:8000/v1" for login in _LOGINS), *_MISTAKES, *(f"http://host/{e}" for e in _ENDS))
OTHERS = (
    *(f"--hub_token={SECRET}", f"--hub_token {SECRET}", f"['--hub_token', '{SECRET}']", f"HF_TOKEN={SECRET}"),
    *(f"HF_TOKEN='{SECRET} {SECRET}'", f"hub_token: {SECRET}", f'"hub_token": "{SECRET}"', f"password={SECRET}"),
    *(f"Authorization: Bearer {SECRET}", f"{{'Authorization': 'Basic {SECRET}'}}", f"xhf_{SECRET}{SECRET}"),
    f"HTTPConnectionPool(host='h', port=1): Max retries exceeded with url: /score?token={SECRET} (Caused by x)",
)


def addresses_of(endpoint: str) -> list[str]:
    """Those that reach a server at `http://HOST:PORT`, path `/good`, each with its secret."""
    place = endpoint.removeprefix("http://")
    logins = [f"http://{login}@{place}/good" for login in _LOGINS if not set(login) & set("/?#[] \\")]
    return [*logins, *(f"{endpoint}/good{end}" for end in _ENDS if end[0] in "?#")]
