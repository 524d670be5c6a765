"""The words that appear on screens and in tasks."""


def _words(text: str) -> list[str]:
    """Split a text; an underscore is a space within a word."""
    return [word.replace("_", " ") for word in text.split()]


APPS = {
    "zh": _words(
        "微信 支付宝 淘宝 京东 美团 抖音 快手 微博 知乎 百度 音乐 相机 相册 日历 时钟 天气 计算器 浏览器 邮件 "
        "地图 视频 备忘录 文件 商店 电话 短信 通讯录 小红书"
    ),
    "en": _words(
        "WeChat Alipay Taobao Chrome Gmail Maps YouTube Camera Photos Calendar Clock Weather Calculator Browser "
        "Mail Music Notes Files Store Phone Messages Contacts Spotify Twitter Uber Amazon Netflix Telegram"
    ),
}
SETTINGS = {
    "zh": _words("设置 蓝牙 无线网络 飞行模式 显示 声音 通知 电池 存储 隐私 安全 账号 语言 壁纸 关于手机 深色模式"),
    "en": _words(
        "Settings Bluetooth Wi-Fi Display Sound Notifications Battery Storage Privacy Security Accounts Language "
        "Wallpaper About_phone Airplane_mode Dark_mode"
    ),
}
BUTTONS = {
    "zh": _words("确定 取消 保存 删除 登录 注册 发送 提交 下一步 完成 购买 加入购物车 关注 分享 评论 跳过"),
    "en": _words("OK Cancel Save Delete Login Send Submit Next Done Buy Follow Share Comment Skip Sign_up Add_to_cart"),
}
FIELDS = {"zh": _words("姓名 手机号 密码 邮箱 地址 验证码"), "en": _words("Name Number Password Email Address Code")}
TABS = {"zh": _words("首页 发现 消息 我的 推荐 热门"), "en": _words("Home Discover Inbox Profile Explore Popular")}
# Names of icons, which have no text on the screen.
ICONS: dict[str, dict[str, str]] = {
    "search": {"en": "search icon", "zh": "搜索图标"},
    "back": {"en": "back arrow", "zh": "返回箭头"},
    "plus": {"en": "plus icon", "zh": "加号图标"},
    "heart": {"en": "heart icon", "zh": "爱心图标"},
    "gear": {"en": "gear icon", "zh": "齿轮图标"},
    "menu": {"en": "menu icon", "zh": "菜单图标"},
    "close": {"en": "close icon", "zh": "关闭图标"},
    "home": {"en": "house icon", "zh": "房子图标"},
    "person": {"en": "person icon", "zh": "头像图标"},
    "bell": {"en": "bell icon", "zh": "铃铛图标"},
    "star": {"en": "star icon", "zh": "星星图标"},
    "camera": {"en": "camera icon", "zh": "相机图标"},
    "dots": {"en": "more icon", "zh": "更多图标"},
    "play": {"en": "play icon", "zh": "播放图标"},
}
SEARCH_FIELD = {"en": "search box", "zh": "搜索框"}

LANGUAGES = ("en", "zh")


def labels() -> list[str]:
    """All labels in a fixed order: texts, icons ("icon:search") and the search box ("field:search")."""
    words: dict[str, None] = {}
    for group in (APPS, SETTINGS, BUTTONS, FIELDS, TABS):
        for language in LANGUAGES:
            words.update(dict.fromkeys(group[language]))
    return [*words, *(f"icon:{key}" for key in ICONS), "field:search"]


def name_of(label: str, language: str) -> str:
    """The name by which tasks refer to a label: the text itself, or the name of the icon or search box."""
    kind, _, key = label.partition(":")
    if kind == "icon":
        return ICONS[key][language]
    if kind == "field":
        return SEARCH_FIELD[language]
    return label


def names_of(label: str) -> list[str]:
    """The distinct names of a label over all languages."""
    return list(dict.fromkeys(name_of(label, language) for language in LANGUAGES))


# Texts to type; never labels.
TYPED_EN = _words(
    "hello world apple coffee pizza weather tomorrow train ticket paris london tokyo berlin hotel flight cheap "
    "shoes red blue dress laptop keyboard monitor book novel history guitar piano dinner lunch recipe chicken "
    "rice soup salad cake birthday gift flowers taxi airport museum park beach summer winter jacket meeting "
    "monday friday good morning thank you please call me back see you later happy new year anna peter maria john "
    "lucy tom alice bob green tea milk bread bike car bus doctor school homework english math test movie star "
    "wars football match score news today"
)
TYPED_ZH = _words(
    "你好 苹果 咖啡 火锅 奶茶 明天 北京 上海 广州 深圳 杭州 成都 火车票 机票 酒店 便宜 鞋子 红色 蓝色 裙子 电脑 "
    "键盘 小说 历史 吉他 钢琴 晚饭 午饭 菜谱 鸡肉 米饭 牛肉面 蛋糕 生日 礼物 鲜花 出租车 机场 博物馆 公园 海边 "
    "夏天 冬天 外套 开会 周一 周五 早上好 谢谢 再见 新年快乐 张三 李四 王五 小明 小红 绿茶 牛奶 面包 自行车 汽车 "
    "公交 医生 学校 作业 英语 数学 考试 电影 足球 比赛 新闻 今天"
)

# Filler texts on screens; no task refers to them.
CLUTTER_ZH = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主年动同工也能下过子说产种面"
    "而方后多定行学法所民得经"
)
CLUTTER_EN = _words(
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what "
    "all were when we there can an your which their said if do will each about how up out them then she many some "
    "so these would"
)
